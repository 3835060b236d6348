"""Scores of prompt columns, and the positions kept of them: [B, K, C] int64, ascending; unused slots last, -1."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class Importance(
    Operator,
    schema="importance(Tensor query, Tensor key, Tensor rows, Tensor lengths, int window, float scale, str reduce, "
    "Tensor? weights=None, Tensor? lse=None, float softcap=0.0, Tensor? sinks=None, Tensor? bias=None) -> Tensor",
    since="PRUNED",
):
    """[B, K, T] float32: the attention that each column gets from the query rows, reduced over a KV head's rows."""

    query: fx.Node  # [B, H, R, D]
    key: fx.Node  # [B, K, T, D]
    rows: fx.Node  # [B, R]
    lengths: fx.Node  # [B]
    window: int
    scale: float
    reduce: str
    weights: fx.Node | None  # [R]
    lse: fx.Node | None  # [B, H, R]
    softcap: float
    sinks: fx.Node | None  # [H]
    bias: fx.Node | None  # [B or 1, H, T]

    @staticmethod
    def fake(query, key, *rest):
        return key.new_empty(key.shape[:3], dtype=torch.float32)


class WeighValues(Operator, schema="weigh_values(Tensor scores, Tensor value) -> Tensor", since="PRUNED"):
    """[B, K, T]: scores times the Euclidean norm of each column's value. Source: arXiv 2406.12335."""

    scores: fx.Node  # [B, K, T]
    value: fx.Node  # [B, K, T, Dv]

    @staticmethod
    def fake(scores, value):
        return torch.empty_like(scores)


class Select(
    Operator,
    schema="select(Tensor scores, Tensor lengths, int budget, int window, int kernel, str pool) -> Tensor",
    since="PRUNED",
):
    """The top C - W columns by pooled score, ties to the lower position, and the last W."""

    scores: fx.Node  # [B, K, T]
    lengths: fx.Node  # [B]
    budget: int
    window: int
    kernel: int
    pool: str

    @staticmethod
    def fake(scores, lengths, budget, window, kernel, pool):
        return scores.new_empty(scores.shape[0], scores.shape[1], budget, dtype=torch.int64)


class SelectHeads(
    Operator,
    schema="select_heads(Tensor scores, Tensor lengths, int budget, int window, int kernel, str pool, int floor) "
    "-> Tensor",
    since="PRUNED",
):
    """Of K heads together the top K (C - W) columns by pooled score, and of each the last W: [B, K, M].

    Each head has its own top `floor` among them, so none more than M - W = K (C - W) - (K - 1) floor. Ties go to the
    lower head, then to the lower position.
    """

    scores: fx.Node  # [B, K, T]
    lengths: fx.Node  # [B]
    budget: int
    window: int
    kernel: int
    pool: str
    floor: int

    @staticmethod
    def fake(scores, lengths, budget, window, kernel, pool, floor):
        kv_heads = scores.shape[1]
        most = window + kv_heads * (budget - window) - (kv_heads - 1) * floor
        return scores.new_empty(scores.shape[0], kv_heads, most, dtype=torch.int64)


class SelectRungs(
    Operator,
    schema="select_rungs(Tensor scores, Tensor attention, Tensor lengths, int budget, int window, int kernel, "
    "str pool, int[] rungs) -> (Tensor, Tensor, Tensor)",
    since="PRUNED",
):
    """As select, and which of R smaller budgets keeps what: positions and the first rung that keeps each [B, K, C], and
    the share of the attention that each rung keeps [B, R].

    What a rung keeps, all larger ones keep. The share is 1 less what falls on dropped columns, in the mean over rows
    and heads: attention to the window and to the lookahead, which are never dropped, counts as kept.
    """

    scores: fx.Node  # [B, K, T]
    attention: fx.Node  # [B, K, T] mean over rows
    lengths: fx.Node  # [B]
    budget: int
    window: int
    kernel: int
    pool: str
    rungs: list[int]  # budgets, ascending, the last of which is `budget`

    @staticmethod
    def fake(scores, attention, lengths, budget, window, kernel, pool, rungs):
        positions = Select.fake(scores, lengths, budget, window, kernel, pool)
        return positions, torch.empty_like(positions), scores.new_empty(scores.shape[0], len(rungs))


class SelectRecent(
    Operator, schema="select_recent(Tensor lengths, int kv_heads, int budget, int sinks) -> Tensor", since="PRUNED"
):
    """The first `sinks` and the last C - sinks positions."""

    lengths: fx.Node
    kv_heads: int
    budget: int
    sinks: int

    @staticmethod
    def fake(lengths, kv_heads, budget, sinks):
        return lengths.new_empty(lengths.shape[0], kv_heads, budget)


class SelectChunk(Operator, schema="select_chunk(Tensor lengths, int kv_heads, int chunk) -> Tensor", since="PRUNED"):
    """The positions of the chunk that the next token belongs to: [B, K, chunk], from a multiple of `chunk` on."""

    lengths: fx.Node
    kv_heads: int
    chunk: int

    @staticmethod
    def fake(lengths, kv_heads, chunk):
        return lengths.new_empty(lengths.shape[0], kv_heads, chunk)


class KeepAll(Operator, schema="keep_all(Tensor lengths, int kv_heads, int budget) -> Tensor", since="DRAFTED"):
    """0 .. lengths[b] - 1 of rows that fit the budget."""

    lengths: fx.Node
    kv_heads: int
    budget: int

    @staticmethod
    def fake(lengths, kv_heads, budget):
        return lengths.new_empty(lengths.shape[0], kv_heads, budget)


class KeepShortRows(
    Operator, schema="keep_short_rows(Tensor positions, Tensor lengths, int budget) -> Tensor", since="PRUNED"
):
    """Positions of a layer with a budget of its own -> [B, K, max(C_l, C)]: rows that fit C keep all."""

    positions: fx.Node
    lengths: fx.Node
    budget: int

    @staticmethod
    def fake(positions, lengths, budget):
        return positions.new_empty(*positions.shape[:2], max(positions.shape[2], budget))


class AddLookahead(Operator, schema="add_lookahead(Tensor positions, Tensor index) -> Tensor", since="PRUNED"):
    """Kept positions and right behind each head's last one the L columns of the lookahead: [B, K, C + L]."""

    positions: fx.Node  # [B, K, C]
    index: fx.Node  # [B, L]

    @staticmethod
    def fake(positions, index):
        return positions.new_empty(*positions.shape[:2], positions.shape[2] + index.shape[1])


class SelectCandidates(
    Operator,
    schema="select_candidates(Tensor scores, Tensor lengths, int budget, int window, int kernel, str pool, int floor, "
    "int least) -> (Tensor, Tensor)",
    since="PRUNED",
):
    """As select_heads, and the pooled scores of what was chosen: [B, K, M] twice.

    A score is infinite in the window and of each head's top `least` (of at most `floor`); -1 where a slot is unused.
    """

    scores: fx.Node  # [B, K, T]
    lengths: fx.Node  # [B]
    budget: int
    window: int
    kernel: int
    pool: str
    floor: int
    least: int

    @staticmethod
    def fake(scores, lengths, budget, window, kernel, pool, floor, least):
        positions = SelectHeads.fake(scores, lengths, budget, window, kernel, pool, floor)
        return positions, scores.new_empty(positions.shape)


class ChooseShared(
    Operator, schema="choose_shared(Tensor[] positions, Tensor scores, int total, int rank) -> Tensor[]", since="PRUNED"
):
    """Of candidates that lie on several ranks, those of this one that are among the `total` best of all: the positions
    of each layer again, -1 where one is not.

    Ties go to the lower layer, head and position; a rank's heads follow those of the rank before.
    """

    positions: list[fx.Node]  # [B, K X] of each of this rank's n layers, see share_layers
    scores: fx.Node  # [P n, B, K X] of all P ranks
    total: int
    rank: int

    @staticmethod
    def fake(positions, scores, total, rank):
        return [torch.empty_like(own) for own in positions]


class ChooseHeads(
    Operator, schema="choose_heads(Tensor positions, Tensor scores, int total, int rank) -> Tensor", since="PRUNED"
):
    """As choose_shared, of one layer, whose heads go on without gaps: [B, K, M] ascending; unused slots last, -1."""

    positions: fx.Node  # [B, K, M] of this rank's candidates, see select_candidates
    scores: fx.Node  # [P B, K, M] of all P ranks
    total: int
    rank: int

    @staticmethod
    def fake(positions, scores, total, rank):
        return torch.empty_like(positions)


class PackHeads(Operator, schema="pack_heads(Tensor items, int slots) -> Tensor", since="PRUNED"):
    """Items [B, K, M] of heads with budgets of their own as [B, slots]: one head's behind the other's, then -1."""

    items: fx.Node  # positions or scores, -1 where unused
    slots: int

    @staticmethod
    def fake(items, slots):
        return items.new_empty(items.shape[0], slots)


class MapPositions(
    Operator, schema="map_positions(Tensor positions, Tensor prompt_positions) -> Tensor", since="PRUNED"
):
    """Kept slots of a compressed prompt, numbered by the original prompt."""

    positions: fx.Node  # [B, K, C]
    prompt_positions: fx.Node  # [B, C1]

    @staticmethod
    def fake(positions, prompt_positions):
        return torch.empty_like(positions)
