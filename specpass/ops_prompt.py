"""The operators of prompt compression (SpecPC) and of the cache's two ways to count; see specpass.ops."""

from __future__ import annotations

import torch

from specpass.kernels import reference_prompt as reference
from specpass.ops import define

# What BudgetCache traces to ------------------------------------------------------------------------------------------


def _read_prompt(key):
    batch, size = key.shape[0], key.shape[2]
    positions = torch.arange(size, device=key.device).expand(batch, -1).contiguous()
    return positions, torch.zeros(batch, dtype=torch.int64, device=key.device)


define(
    "read_prompt(Tensor key) -> (Tensor, Tensor)",  # positions read, shift of the positions: all of them, 0
    _read_prompt,
    lambda key: (
        key.new_empty(key.shape[0], key.shape[2], dtype=torch.int64),
        key.new_empty(key.shape[0], dtype=torch.int64),
    ),
)


def _widen(storage, kv_heads, slots):
    view = storage.unflatten(1, (kv_heads, -1))
    return torch.nn.functional.pad(view, (0, 0, 0, slots - view.shape[2]))


define(  # what the model's own attention would read where layers have unlike budgets; specialize reads the storage
    "widen(Tensor storage, int kv_heads, SymInt slots) -> Tensor",
    _widen,
    lambda storage, kv_heads, slots: storage.new_empty(storage.shape[0], kv_heads, slots, storage.shape[2]),
)


def _advance(seen, shift, count):
    seen.add_(count)


define("advance(Tensor(a!) seen, Tensor? shift, SymInt count) -> ()", _advance, lambda seen, shift, count: None)
define(
    "told_positions(Tensor position_ids, Tensor shift) -> Tensor",
    reference.told_positions,
    lambda position_ids, shift: position_ids.new_empty(shift.shape[0], position_ids.shape[1]),
)
define(
    "told_length(Tensor seen, Tensor shift) -> Tensor", reference.told_length, lambda seen, shift: seen.new_empty(())
)

# Scores of prompt tokens ---------------------------------------------------------------------------------------------

define(
    "row_weights(Tensor lengths, int window) -> Tensor",
    reference.row_weights,
    lambda lengths, window: lengths.new_empty(window, dtype=torch.float32),
)
define(
    "no_scores(Tensor like, int kv_heads) -> Tensor",
    reference.no_scores,
    lambda like, kv_heads: like.new_empty(like.shape[0], like.shape[1] // kv_heads, dtype=torch.float32),
)
define(
    "merge_layer(Tensor total, Tensor scores, str reduce) -> Tensor",
    reference.merge_layer,
    lambda total, scores, reduce: torch.empty_like(total),
)
define(
    "merge_step(Tensor total, Tensor scores, str reduce) -> Tensor",
    reference.merge_step,
    lambda total, scores, reduce: torch.empty_like(total),
)

# The tokens that the target reads ------------------------------------------------------------------------------------

define(
    "select_prompt(Tensor scores, Tensor lengths, int budget, int window, int kernel, int neighbours, str pool) "
    "-> Tensor",
    reference.select_prompt,
    lambda scores, lengths, budget, *rest: lengths.new_empty(lengths.shape[0], budget),
)
define(
    "take_ids(Tensor ids, Tensor positions) -> Tensor",
    reference.take_ids,
    lambda ids, positions: ids.new_empty(positions.shape),
)
define(
    "count_kept(Tensor positions) -> Tensor",
    reference.count_kept,
    lambda positions: positions.new_empty(positions.shape[0]),
)
define("number_anew(Tensor positions) -> Tensor", reference.number_anew, torch.empty_like)
define(
    "map_positions(Tensor positions, Tensor prompt_positions) -> Tensor",
    reference.map_positions,
    lambda positions, prompt_positions: torch.empty_like(positions),
)
define(
    "keep_short_rows(Tensor positions, Tensor lengths, int budget) -> Tensor",
    reference.keep_short_rows,
    lambda positions, lengths, budget: positions.new_empty(*positions.shape[:2], max(positions.shape[2], budget)),
)
