"""The operators that graphs hold between passes, with a schema, an aten reference and a fake kernel each.

They stay opaque so that passes can find them by name; no operator takes a module or a Python object. The references
are in `specpass/kernels/reference.py`, where shapes and formulas are written down. Operators with a generated kernel
go through `specpass/kernels/dispatch.py`: one implementation for all devices that asks the table, because an
implementation registered for the CPU alone breaks under Inductor.
"""

from __future__ import annotations

import torch

from specpass.kernels import dispatch, reference

NAMESPACE = "specpass"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, run, fake) -> None:
    """Register one operator: its schema, its aten reference for any device, its fake kernel."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


# What BudgetCache.update traces to -----------------------------------------------------------------------------------


def _fill(key, value, handle, budget, room, lookahead, layer, layers, short):
    return reference.fill(key, value, room)


def _fill_fake(key, value, handle, budget, room, lookahead, layer, layers, short):
    batch, heads, size, dim = key.shape
    slots = size + room
    return (
        key.new_empty(batch, heads * slots, dim),
        value.new_empty(batch, heads * slots, value.shape[3]),
        key.new_empty(batch, heads, dtype=torch.int64),
        key.new_empty(batch, heads, slots - room, dtype=torch.int64),
    )


define(
    "fill(Tensor key, Tensor value, Tensor handle, int budget, int room, int lookahead, int layer, int layers, "
    "bool short) -> (Tensor, Tensor, Tensor, Tensor)",
    _fill,
    _fill_fake,
)


def _lookahead(key, given, length):
    if given is not None:
        return given.to(key.device, copy=True)
    return torch.full((key.shape[0], length), -1, dtype=torch.int64, device=key.device)


define(
    "lookahead(Tensor key, Tensor? given, int length) -> Tensor",
    _lookahead,
    lambda key, given, length: key.new_empty(key.shape[0], length, dtype=torch.int64),
)
define(
    "size(Tensor x, int dim) -> Tensor",
    lambda x, dim: torch.full((), x.shape[dim], dtype=torch.int64, device=x.device),
    lambda x, dim: x.new_empty((), dtype=torch.int64),
)


def _append_kv(keys, values, lengths, key, value, handle):
    reference.append_kv(keys, values, lengths, key, value)


define(
    "append_kv(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor key, Tensor value, Tensor? handle) -> ()",
    _append_kv,
    lambda keys, values, lengths, key, value, handle: None,
)

define(
    "extend_kv(Tensor keys, Tensor values, Tensor key, Tensor value) -> (Tensor, Tensor)",
    reference.extend_kv,
    lambda keys, values, key, value: tuple(
        torch.cat([states, new], 2).flatten(1, 2) for states, new in ((keys, key), (values, value))
    ),
)

# Rows: packing, appending, taking ------------------------------------------------------------------------------------

define(
    "pack_order(Tensor attention_mask, Tensor ids) -> (Tensor, Tensor)",
    lambda mask, ids: reference.pack_order(mask),
    lambda mask, ids: (ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty(ids.shape[0], dtype=torch.int64)),
)
define(
    "full_lengths(Tensor ids) -> Tensor",
    lambda ids: torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64, device=ids.device),
    lambda ids: ids.new_empty(ids.shape[0], dtype=torch.int64),
)
define(
    "pack_ids(Tensor ids, Tensor order) -> Tensor", reference.pack_ids, lambda ids, order: ids.new_empty(order.shape)
)
define(
    "append_ids(Tensor ids, Tensor extra, Tensor lengths) -> Tensor",
    reference.append_ids,
    lambda ids, extra, lengths: ids.new_empty(ids.shape[0], ids.shape[1] + extra.shape[1]),
)
define(
    "append_positions(Tensor positions, Tensor lengths, int length) -> Tensor",
    reference.append_positions,
    lambda positions, lengths, length: positions.new_empty(lengths.shape[0], positions.shape[1] + length),
)
define(
    "expand_rows(Tensor ids, Tensor like) -> Tensor",
    lambda ids, like: ids.expand(like.shape[0], -1).clone(memory_format=torch.contiguous_format),
    lambda ids, like: ids.new_empty(like.shape[0], ids.shape[1]),
)
define(
    "row_index(Tensor ids) -> Tensor",
    lambda ids: torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous(),
    lambda ids: ids.new_empty(ids.shape),
)
define("unpack_index(Tensor order) -> Tensor", reference.unpack_index, lambda order: order.new_empty(order.shape))
define(
    "take_positions(Tensor hidden, Tensor index) -> Tensor",
    reference.take_positions,
    lambda hidden, index: hidden.new_empty(hidden.shape[0], index.shape[1], hidden.shape[2]),
)
define(
    "score_rows(Tensor lengths, Tensor? lookahead_ids, int window, int[] eos_ids) -> Tensor",
    reference.score_rows,
    lambda lengths, ids, window, eos_ids: lengths.new_empty(
        lengths.shape[0], window + (0 if ids is None else ids.shape[1])
    ),
)
define(
    "take_rows(Tensor query, Tensor rows) -> Tensor",
    reference.take_rows,
    lambda query, rows: query.new_empty(query.shape[0], query.shape[1], rows.shape[1], query.shape[3]),
)

# Scores, indices, compact K and V ------------------------------------------------------------------------------------

define(
    "importance(Tensor query, Tensor key, Tensor rows, Tensor lengths, int window, float scale, str reduce, "
    "Tensor? weights=None, Tensor? lse=None, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    dispatch.importance,
    lambda query, key, *rest: key.new_empty(key.shape[:3], dtype=torch.float32),
)
define(
    "select(Tensor scores, Tensor lengths, int budget, int window, int kernel, str pool) -> Tensor",
    reference.select,
    lambda scores, lengths, budget, window, kernel, pool: scores.new_empty(
        scores.shape[0], scores.shape[1], budget, dtype=torch.int64
    ),
)
define(
    "select_recent(Tensor lengths, int kv_heads, int budget, int sinks) -> Tensor",
    reference.select_recent,
    lambda lengths, kv_heads, budget, sinks: lengths.new_empty(lengths.shape[0], kv_heads, budget),
)


def _gather_kv_fake(key, value, positions, room):
    batch, heads, budget = positions.shape
    slots = heads * (budget + room)
    return (
        key.new_empty(batch, slots, key.shape[3]),
        value.new_empty(batch, slots, value.shape[3]),
        positions.new_empty(batch, heads),
    )


define(
    "keep_all(Tensor lengths, int kv_heads, int budget) -> Tensor",
    reference.keep_all,
    lambda lengths, kv_heads, budget: lengths.new_empty(lengths.shape[0], kv_heads, budget),
)
define(
    "gather_kv(Tensor key, Tensor value, Tensor positions, int room) -> (Tensor, Tensor, Tensor)",
    dispatch.gather_kv,
    _gather_kv_fake,
)

define(
    "keep_kv(Tensor key, Tensor value, Tensor lengths, SymInt room) -> (Tensor, Tensor, Tensor)",
    reference.keep_kv,
    lambda key, value, lengths, room: (
        key.new_empty(key.shape[0], key.shape[1] * (key.shape[2] + room), key.shape[3]),
        value.new_empty(value.shape[0], value.shape[1] * (value.shape[2] + room), value.shape[3]),
        lengths.new_empty(key.shape[0], key.shape[1]),
    ),
)

# Attention and the draft's next token --------------------------------------------------------------------------------

define(
    "modified_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, "
    "Tensor? sinks) -> Tensor",
    reference.modified_attention,
    lambda query, key, value, *rest: query.new_empty(*query.shape[:3], value.shape[3]),
)


def _attend_fake(query, keys, values, lengths, scale, softcap=0.0, sinks=None):
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], values.shape[3])


define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    dispatch.attend,
    _attend_fake,
)


def _prefill_attention_fake(query, key, value, scale, softcap=0.0, sinks=None):
    batch, heads, columns, _ = query.shape
    return query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)


def _rows_in_place(out):
    # One memory format for every path, as the fake kernel says: [B, T, H, Dv] rows, which o_proj reads in place.
    return out if out.transpose(1, 2).is_contiguous() else out.transpose(1, 2).contiguous().transpose(1, 2)


def _prefill_attention(query, key, value, scale, softcap=0.0, sinks=None):
    return _rows_in_place(dispatch.prefill_attention(query, key, value, scale, softcap, sinks))


define(
    "prefill_attention(Tensor query, Tensor key, Tensor value, float scale, float softcap=0.0, Tensor? sinks=None) "
    "-> Tensor",
    _prefill_attention,
    _prefill_attention_fake,
)
# What the lowering makes of two operators that share their work ------------------------------------------------------


def _prefill_attention_lse(query, key, value, rows, scale):
    out, lse = reference.prefill_attention_lse(query, key, value, rows, scale)
    return _rows_in_place(out), lse


define(
    "prefill_attention_lse(Tensor query, Tensor key, Tensor value, Tensor rows, float scale) -> (Tensor, Tensor)",
    _prefill_attention_lse,
    lambda query, key, value, rows, scale: (
        _prefill_attention_fake(query, key, value, scale),
        query.new_empty(query.shape[0], query.shape[1], rows.shape[1], dtype=torch.float32),
    ),
)
define(
    "append_attend(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor query, Tensor key, Tensor value, "
    "float scale, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    dispatch.append_attend,
    lambda keys, values, lengths, query, key, value, scale, *rest: _attend_fake(query, key, value, lengths, scale),
)

# ---------------------------------------------------------------------------------------------------------------------

define(
    "next_token(Tensor logits, Tensor ended, int vocab, float temperature, int seed, int step, int[] eos_ids, "
    "int pad_id) -> (Tensor, Tensor)",
    reference.next_token,
    lambda logits, ended, *rest: (ended.new_empty(ended.shape[0], 1, dtype=torch.int64), torch.empty_like(ended)),
)
