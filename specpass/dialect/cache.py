"""What a BudgetCache's calls trace to, and what becomes of them.

Shapes: B batch, S prompt, K KV heads, D and Dv head dimensions, C budget, N room, P = C + N slots, q new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specpass.bits import Layout, blocks_of
from specpass.dialect.define import Operator


class Fill(
    Operator,
    schema="fill(Tensor key, Tensor value, Tensor handle, int budget, SymInt room, int layer, bool short) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    until="DRAFTED",
):
    """A layer's prefill: keys [B, K * (S + N), D], values, lengths [B, K], positions [B, K, S], all kept.

    What the cache's `update` traces to; gather_prune puts the layer's budget in its place. `handle` leads to the cache;
    `short`: the prompt fits the budget, and is kept whole.
    """

    key: fx.Node  # [B, K, S, D]
    value: fx.Node  # [B, K, S, Dv]
    handle: fx.Node
    budget: int
    room: Any  # a symbol: answers of any length go on from one graph
    layer: int
    short: bool

    @staticmethod
    def fake(key, value, handle, budget, room, layer, short):
        batch, heads, size, dim = key.shape
        slots = size + room
        return (
            key.new_empty(batch, heads * slots, dim),
            value.new_empty(batch, heads * slots, value.shape[3]),
            key.new_empty(batch, heads, dtype=torch.int64),
            key.new_empty(batch, heads, slots - room, dtype=torch.int64),
        )


class AppendKv(
    Operator,
    schema="append_kv(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor key, Tensor value, "
    "Tensor? handle, Tensor? positions=None, Tensor? offsets=None, Tensor[]? quantized=None, int bits=0, "
    "Tensor? queries=None, Tensor[]? prompt=None) -> ()",
):
    """q new KV pairs behind the slots in use, in place; `lengths` advances."""

    keys: fx.Node  # [B, K * P, D]
    values: fx.Node  # [B, K * P, Dv]
    lengths: fx.Node  # [B, K]
    key: fx.Node  # [B, K, q, D]
    value: fx.Node
    handle: fx.Node | None  # leads to the cache until specialize drops it
    positions: fx.Node | None  # [B, K, C] of the prompt's slots, where attention adds a bias; attend_slots reads them
    offsets: fx.Node | None  # [B, K] first slot of each head, where heads have budgets of their own
    quantized: (
        list[fx.Node] | None
    )  # a prompt in so many `bits` in front of the slots, see QuantizeKv; for attend_slots
    bits: int
    queries: fx.Node | None  # [B, H, W, D] of the newest tokens, where evictions ask by them; note_queries writes them
    prompt: list[fx.Node] | None  # one that several sequences share, in front of the slots, see AttendCascade; likewise

    @staticmethod
    def fake(keys, values, lengths, key, value, *rest):
        return None


class NoteQueries(
    Operator,
    schema="note_queries(Tensor(a!) queries, Tensor query, float scale, Tensor? padding=None) -> ()",
    since="PRUNED",
):
    """The newest W queries, times the scale, with those of q tokens behind them, in place."""

    queries: fx.Node  # [B, H, W, D]
    query: fx.Node  # [B, H, q, D], each row's real tokens first
    scale: float
    padding: fx.Node | None  # [B] tokens of each row that are none

    @staticmethod
    def fake(queries, query, scale, padding=None):
        return None


class QuantizeKv(
    Operator,
    schema="quantize_kv(Tensor keys, Tensor values, Tensor lengths, int slots, SymInt room, int bits) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    """A layer's C slots of the prompt in 8, 4 or 2 bits, and its N free ones as a storage of their own: keys
    [B, K * N, D], values, lengths [B, K], 0; codes [B, K, n, bytes] uint8, counts [B, K], basis [B, K, r, D + Dv] (see
    specpass/bits.py).
    """

    keys: fx.Node  # [B, K * (C + N), D]
    values: fx.Node  # [B, K * (C + N), Dv]
    lengths: fx.Node  # [B, K] of the prompt
    slots: int
    room: Any
    bits: int

    @staticmethod
    def fake(keys, values, lengths, slots, room, bits):
        batch, heads = lengths.shape
        layout = Layout(bits, keys.shape[2], values.shape[2], keys.element_size())
        return (
            keys.new_empty(batch, heads * room, layout.dim),
            values.new_empty(batch, heads * room, layout.value_dim),
            torch.empty_like(lengths),
            keys.new_empty(batch, heads, blocks_of(slots), layout.block_bytes, dtype=torch.uint8),
            torch.empty_like(lengths),
            keys.new_empty(batch, heads, layout.rank, layout.dim + layout.value_dim),
        )


class HeadOffsets(Operator, schema="head_offsets(Tensor lengths, SymInt room) -> (Tensor, Tensor)"):
    """Of heads with budgets of their own the first slot [B, K], behind its predecessors' slots and N each, and lengths
    [B, K] again, which stay as they are."""

    lengths: fx.Node  # [B, K] of the prompt
    room: Any

    @staticmethod
    def fake(lengths, room):
        return torch.empty_like(lengths), torch.empty_like(lengths)


class KeptShares(Operator, schema="kept_shares(Tensor positions, int[] rungs) -> (Tensor, Tensor)"):
    """Of positions [B, K, C] the first of R rungs that keeps each [B, K, C], and each rung's share of the attention
    [B, R]: rung 0, and all of it, until gather_prune knows better (see select_rungs)."""

    positions: fx.Node
    rungs: list[int]

    @staticmethod
    def fake(positions, rungs):
        shares = positions.new_empty(positions.shape[0], len(rungs), dtype=torch.float32)
        return torch.empty_like(positions), shares


class ShowHeads(Operator, schema="show_heads(Tensor storage, Tensor offsets, SymInt slots) -> Tensor", until="DRAFTED"):
    """What the model's own attention is shown of such heads: [B, K, slots, D], zeros."""

    storage: fx.Node  # [B, T, D]
    offsets: fx.Node  # [B, K]
    slots: Any

    @staticmethod
    def fake(storage, offsets, slots):
        return storage.new_empty(*offsets.shape, slots, storage.shape[2])


class TakeBack(Operator, schema="take_back(Tensor(a!) lengths, Tensor padding) -> ()", since="PRUNED"):
    """Of the slots in use, the last `padding` [B] of each row are free again, in place."""

    lengths: fx.Node  # [B, K]
    padding: fx.Node  # [B]

    @staticmethod
    def fake(lengths, padding):
        return None


class KeepKv(
    Operator, schema="keep_kv(Tensor key, Tensor value, Tensor lengths, SymInt room) -> (Tensor, Tensor, Tensor)"
):
    """A draft layer's prefill: all of K and V, and room for its own tokens, which overwrite a short row's padding."""

    key: fx.Node  # [B, K, S, D]
    value: fx.Node
    lengths: fx.Node  # [B]
    room: Any

    @staticmethod
    def fake(key, value, lengths, room):
        return (
            key.new_empty(key.shape[0], key.shape[1] * (key.shape[2] + room), key.shape[3]),
            value.new_empty(value.shape[0], value.shape[1] * (value.shape[2] + room), value.shape[3]),
            lengths.new_empty(key.shape[0], key.shape[1]),
        )


class ExtendKv(Operator, schema="extend_kv(Tensor keys, Tensor values, Tensor key, Tensor value) -> (Tensor, Tensor)"):
    """Storage of a cache that keeps everything, q tokens on: [B, K, n, D] -> [B, K * (n + q), D]."""

    keys: fx.Node
    values: fx.Node
    key: fx.Node
    value: fx.Node

    @staticmethod
    def fake(keys, values, key, value):
        return tuple(torch.cat([states, new], 2).flatten(1, 2) for states, new in ((keys, key), (values, value)))


class Lookahead(Operator, schema="lookahead(Tensor key, Tensor? given, int length) -> Tensor"):
    """[B, L] lookahead ids: the caller's where given, else -1 until insert_draft puts the draft's in its place."""

    key: fx.Node  # of which only the batch is read
    given: fx.Node | None
    length: int

    @staticmethod
    def fake(key, given, length):
        return key.new_empty(key.shape[0], length, dtype=torch.int64)


class ReadPrompt(Operator, schema="read_prompt(Tensor key, Tensor? scores=None) -> (Tensor, Tensor)", until="TRACED"):
    """Prompt positions that the target reads [B, S] and the shift of its positions [B]: all, and 0, until rewritten."""

    key: fx.Node
    scores: fx.Node | None  # [B, S] of the prompt's tokens, packed, where the draft read them in front of the graph

    @staticmethod
    def fake(key, scores=None):
        return (
            key.new_empty(key.shape[0], key.shape[2], dtype=torch.int64),
            key.new_empty(key.shape[0], dtype=torch.int64),
        )


class Size(Operator, schema="size(Tensor x, int dim) -> Tensor"):
    """A size as a 0-d tensor: the cache's logical length, in the caller's columns."""

    x: fx.Node
    dim: int

    @staticmethod
    def fake(x, dim):
        return x.new_empty((), dtype=torch.int64)


class Advance(Operator, schema="advance(Tensor(a!) seen, Tensor? shift, SymInt count) -> ()"):
    """The logical length [], `count` tokens on, in place; `shift` [B] is read by shift_positions."""

    seen: fx.Node
    shift: fx.Node | None
    count: Any

    @staticmethod
    def fake(seen, shift, count):
        return None


class Widen(Operator, schema="widen(Tensor storage, int kv_heads, SymInt slots) -> Tensor", until="DRAFTED"):
    """What the model's own attention would read where layers have unlike budgets: [B, K, slots, D], padded."""

    storage: fx.Node  # [B, K * P, D]
    kv_heads: int
    slots: Any

    @staticmethod
    def fake(storage, kv_heads, slots):
        return storage.new_empty(storage.shape[0], kv_heads, slots, storage.shape[2])


class GatherKv(
    Operator,
    schema="gather_kv(Tensor key, Tensor value, Tensor positions, SymInt room) -> (Tensor, Tensor, Tensor)",
    since="PRUNED",
):
    """The kept K and V as the cache's storage: keys [B, K * (C + N), D], values, lengths [B, K]."""

    key: fx.Node  # [B, K, T, D]
    value: fx.Node
    positions: fx.Node  # [B, K, C], unused slots -1
    room: Any

    @staticmethod
    def fake(key, value, positions, room):
        return GatherRagged.fake(key, value, positions, positions.shape[1] * positions.shape[2], room)


class GatherRagged(
    Operator,
    schema="gather_ragged(Tensor key, Tensor value, Tensor positions, int slots, SymInt room) "
    "-> (Tensor, Tensor, Tensor)",
    since="PRUNED",
):
    """As gather_kv, for heads with budgets of their own: keys [B, slots + K * N, D], values, lengths [B, K].

    One head's slots and its room lie behind the other's (see head_offsets). No more than `slots` positions are used.
    """

    key: fx.Node  # [B, K, T, D]
    value: fx.Node
    positions: fx.Node  # [B, K, M], unused ones last, -1
    slots: int
    room: Any

    @staticmethod
    def fake(key, value, positions, slots, room):
        batch, heads = positions.shape[:2]
        total = slots + heads * room
        return (
            key.new_empty(batch, total, key.shape[3]),
            value.new_empty(batch, total, value.shape[3]),
            positions.new_empty(batch, heads),
        )


class ShareLayers(
    Operator,
    schema="share_layers(Tensor[] keys, Tensor[] values, Tensor[] lengths, Tensor[] positions, Tensor[] scores, "
    "int budget, int ahead, SymInt room) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
    since="PRUNED",
):
    """Of the candidates of n layers with K heads the n K C best, as one storage: keys [B, n K (C + N), D], values,
    positions [B, n K C], and of each layer lengths, offsets and lengths again [B, K].

    Ties go to the lower layer, head and position. The L columns of a lookahead follow each head's last position, and
    are not counted.
    """

    keys: list[fx.Node]  # [B, K (X + L), D] of each layer, heads with budgets of their own
    values: list[fx.Node]
    lengths: list[fx.Node]  # [B, K] candidates of each head, without the lookahead
    positions: list[fx.Node]  # [B, K X], one head's behind the other's, unused ones last, -1
    scores: list[fx.Node]  # as positions, infinite where one is kept anyway; no scores: all are
    budget: int
    ahead: int
    room: Any

    @staticmethod
    def fake(keys, values, lengths, positions, scores, budget, ahead, room):
        heads = len(keys) * lengths[0].shape[1]
        slots = heads * (budget + room)
        return (
            *(states[0].new_empty(states[0].shape[0], slots, states[0].shape[2]) for states in (keys, values)),
            positions[0].new_empty(positions[0].shape[0], heads * budget),
            *([torch.empty_like(own) for own in lengths] for _ in range(3)),
        )
