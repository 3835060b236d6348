"""Scores of prompt columns and the positions kept of them, in plain aten.

Symbols: B batch, T columns, K KV heads, W window, C budget. Formulas: arXiv 2506.08373; SnapKV (2404.14469).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import select as dialect
from specpass.kernels.cpu import importance as own
from specpass.kernels.gather.reference import slot_sources
from specpass.kernels.importance import reference
from specpass.ops.bind import bind


def importance(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The reference's, or the CPU's own where nothing changes the logits."""
    operands = (query, key, rows, lengths, window, scale, reduce, weights, lse)
    if softcap or sinks is not None or bias is not None or own.refuse(query, key, scale) is not None:
        return reference.importance(*operands, softcap, sinks, bias)
    return own.importance(*operands)


def weigh_values(scores: Tensor, value: Tensor) -> Tensor:
    """Scores [B, K, T] float32 times the norms, in float32, of value [B, K, T, Dv]."""
    return scores * torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)


def weigh_values_onnx(scores: Tensor, value: Tensor) -> Tensor:
    """As the reference."""
    return scores * value.float().square().sum(-1).sqrt()


def select(scores: Tensor, lengths: Tensor, budget: int, window: int, kernel: int, pool: str) -> Tensor:
    """Pooled scores -> kept positions: the top C - W, ties to the lower position, and the last W.

    Args: scores [B, K, T] float32, 0 outside the scored columns; lengths [B].
    Returns: positions [B, K, C] int64, ascending; unused slots -1.
    """
    top, never = budget - window, scores.shape[2] + budget
    values, index = _best(scores, lengths, top, window, kernel, pool)
    best = index.masked_fill(values < 0, never)
    return _ascending(torch.cat([best, _last(lengths, window, scores.shape[1], never)], -1), never)


def select_rungs(
    scores: Tensor,
    attention: Tensor,
    lengths: Tensor,
    budget: int,
    window: int,
    kernel: int,
    pool: str,
    rungs: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`select`, the first rung that keeps each position [B, K, C], and what each rung keeps of the attention [B, R].

    Args: scores [B, K, T] float32; attention [B, K, T]: mean probability of each column over the rows that score; both
    0 outside the scored columns. lengths [B]; rungs: budgets, ascending, the last of which is `budget`.
    """
    top, never = budget - window, scores.shape[2] + budget
    values, index = _best(scores, lengths, top, window, kernel, pool)
    unused = values < 0
    found = torch.cat([index.masked_fill(unused, never), _last(lengths, window, scores.shape[1], never)], -1)
    found, order = found.sort(-1)
    rank = torch.arange(budget, device=scores.device)
    first = sum((rank >= rung - window).long() for rung in rungs[:-1]) + torch.zeros_like(rank)
    first = first.masked_fill(rank >= top, 0)  # the window
    kept = attention.gather(2, index.clamp(max=scores.shape[2] - 1)).masked_fill(unused, 0.0).cumsum(-1)
    kept = torch.stack([kept[..., rung - window - 1] for rung in rungs], -1)  # [B, K, R]
    dropped = (attention.sum(-1, keepdim=True) - kept).clamp(min=0.0).mean(1)
    return found.masked_fill(found >= never, -1), first.expand_as(order).gather(-1, order), 1.0 - dropped


def select_heads(
    scores: Tensor, lengths: Tensor, budget: int, window: int, kernel: int, pool: str, floor: int
) -> Tensor:
    """As `select` for K heads that share K * C slots: [B, K, M]. Source: AdaKV, arXiv 2407.11550, Algorithm 1.

    The top K (C - W) of all heads' scores, where a head's own top `floor` come first.
    """
    return select_candidates(scores, lengths, budget, window, kernel, pool, floor, 0)[0]


def select_candidates(
    scores: Tensor, lengths: Tensor, budget: int, window: int, kernel: int, pool: str, floor: int, least: int
) -> tuple[Tensor, Tensor]:
    """`select_heads`, and pooled scores [B, K, M]: infinite in the window and of each head's top `least`."""
    kv_heads = scores.shape[1]
    total = kv_heads * (budget - window)
    most = total - (kv_heads - 1) * floor  # of one head, where the others get no more than their floor
    never = scores.shape[2] + most
    values, index = _best(scores, lengths, most, window, kernel, pool)
    rank = torch.arange(most, device=scores.device)
    urgent = values.masked_fill((rank < floor) & (values >= 0), float("inf")).flatten(1)
    # Heads lie behind each other, each by falling scores: among equal ones the lower head, then the lower position.
    order = torch.sort(urgent, dim=-1, descending=True, stable=True).indices[:, :total]
    chosen = torch.zeros_like(urgent, dtype=torch.bool).scatter(1, order, True).view_as(values) & (values >= 0)
    last = _last(lengths, window, kv_heads, never)
    found = torch.cat([index.masked_fill(~chosen, never), last], -1)
    worth = values.masked_fill(rank < least, float("inf"))
    worth = F.pad(worth, (0, window), value=float("inf")).masked_fill(found >= never, -1.0)
    found, order = found.sort(-1)
    return found.masked_fill(found >= never, -1), worth.gather(-1, order)


def choose_shared(positions: list[Tensor], scores: Tensor, total: int, rank: int) -> list[Tensor]:
    """Of this rank's candidates those that are among the `total` best of all ranks; see the operator.

    Args: positions [B, K X] of each of n layers; scores [P n, B, K X].
    """
    layers, size = len(positions), positions[0].shape[1]
    by_rank = scores.unflatten(0, (-1, layers))
    every = by_rank.permute(2, 1, 0, 3).flatten(1)  # [B, n P K X]: layers, their heads, positions
    best = torch.sort(every, dim=1, descending=True, stable=True).indices[:, :total]
    keep = torch.zeros_like(every, dtype=torch.bool).scatter(1, best, True)
    mine = keep.view(len(every), layers, -1, size)[:, :, rank]
    return [own.masked_fill(~mine[:, index], -1) for index, own in enumerate(positions)]


def choose_heads(positions: Tensor, scores: Tensor, total: int, rank: int) -> Tensor:
    """Of this rank's candidates those that are among the `total` best of all ranks, as `select` gives them.

    Args: positions [B, K, M]; scores [P B, K, M]: infinite where one is kept anyway, -1 where a slot is unused.
    """
    never = torch.iinfo(positions.dtype).max
    by_rank = scores.unflatten(0, (-1, len(positions))).flatten(2)  # [P, B, K M]
    (chosen,) = choose_shared([positions.flatten(1)], by_rank, total, rank)
    chosen = chosen.view_as(positions)
    return _ascending(chosen.masked_fill(chosen < 0, never), never)


def _best(scores: Tensor, lengths: Tensor, top: int, window: int, kernel: int, pool: str) -> tuple[Tensor, Tensor]:
    """The best `top` columns of each head in front of the window, by pooled scores.

    Returns: scores [B, K, top], falling, and columns, equal scores in order of position; -1.0 behind the last one.
    """
    pad = kernel // 2
    pooled = F.max_pool1d(scores, kernel, 1, pad) if pool == "max" else F.avg_pool1d(scores, kernel, 1, pad)
    column = torch.arange(scores.shape[2], device=scores.device)
    outside = (column >= (lengths - window)[:, None])[:, None]
    pooled = F.pad(pooled.masked_fill(outside, -1.0), (0, top), value=-1.0)  # T may be shorter
    # A stable sort keeps equal scores in order of position, which torch.topk does not promise.
    values, index = torch.sort(pooled, dim=-1, descending=True, stable=True)
    return values[..., :top], index[..., :top]


def _last(lengths: Tensor, window: int, kv_heads: int, never: int) -> Tensor:
    """[B, K, W]: the last W positions of each row; `never` where it is shorter."""
    last = torch.arange(-window, 0, device=lengths.device) + lengths[:, None]
    return last.masked_fill(last < 0, never)[:, None].expand(-1, kv_heads, -1)


def select_recent(lengths: Tensor, kv_heads: int, budget: int, sinks: int) -> Tensor:
    """The first `sinks` and the last C - sinks positions: [B, K, C] int64, ascending; unused slots -1."""
    slot = torch.arange(budget, device=lengths.device)
    shift = (lengths - budget).clamp(min=0)[:, None]
    positions = torch.where(slot < sinks, slot, slot + shift)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    return positions[:, None].expand(-1, kv_heads, -1).contiguous()


def select_chunk(lengths: Tensor, kv_heads: int, chunk: int) -> Tensor:
    """Positions [B, K, chunk] of the chunk that a row's next token belongs to, ascending; unused slots -1."""
    slot = torch.arange(chunk, device=lengths.device)
    used = (lengths % chunk)[:, None]
    positions = torch.where(slot < used, slot + lengths[:, None] - used, -1)
    return positions[:, None].expand(-1, kv_heads, -1).contiguous()


def keep_all(lengths: Tensor, kv_heads: int, budget: int) -> Tensor:
    """Positions [B, K, C] of rows that fit the budget: 0 .. lengths[b] - 1, then -1."""
    slot = torch.arange(budget, device=lengths.device)
    positions = torch.where(slot < lengths[:, None], slot, -1)
    return positions[:, None].expand(-1, kv_heads, -1).contiguous()


def keep_short_rows(positions: Tensor, lengths: Tensor, budget: int) -> Tensor:
    """Positions [B, K, C_l] of a layer with a budget of its own -> [B, K, max(C_l, C)]: rows that fit C keep all."""
    kv_heads, own = positions.shape[1:]
    wide = max(own, budget)
    every = keep_all(lengths, kv_heads, wide)
    return torch.where((lengths <= budget)[:, None, None], every, F.pad(positions, (0, wide - own), value=-1))


def pack_heads(items: Tensor, slots: int) -> Tensor:
    """Items [B, K, M] without gaps, one head's behind the other's: [B, slots], unused slots last, -1."""
    head, rank = slot_sources((items >= 0).sum(-1), slots, 0)
    return items.flatten(1).gather(1, head * items.shape[2] + rank.clamp(min=0)).masked_fill(rank < 0, -1)


def map_positions(positions: Tensor, prompt_positions: Tensor) -> Tensor:
    """Kept slots [B, K, C] of a compressed prompt, numbered by the original prompt [B, C1]; -1 stays -1."""
    source = prompt_positions[:, None].expand(-1, positions.shape[1], -1)
    return source.gather(2, positions.clamp(min=0)).masked_fill(positions < 0, -1)


def _ascending(positions: Tensor, never: int) -> Tensor:
    ordered = positions.sort(-1).values
    return ordered.masked_fill(ordered >= never, -1)


def importance_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """query [B, H, R, D], key [B, K, T, D]: one product."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * dim


def add_lookahead(positions: Tensor, index: Tensor) -> Tensor:
    """Positions [B, K, C] and, behind the last one in use, the columns index [B, L]: [B, K, C + L], unused -1."""
    lookahead = index.shape[1]
    slot = (positions >= 0).sum(-1, keepdim=True) + torch.arange(lookahead, device=positions.device)
    columns = index[:, None].expand(-1, positions.shape[1], -1)
    return F.pad(positions, (0, lookahead), value=-1).scatter(2, slot, columns)


bind(dialect.Importance, importance, onnx=reference.importance, flops=importance_flops)
bind(dialect.WeighValues, weigh_values, onnx=weigh_values_onnx)
bind(dialect.Select, select)
bind(dialect.SelectRungs, select_rungs)
bind(dialect.SelectHeads, select_heads)
bind(dialect.SelectRecent, select_recent)
bind(dialect.SelectChunk, select_chunk)
bind(dialect.KeepAll, keep_all)
bind(dialect.KeepShortRows, keep_short_rows)
bind(dialect.SelectCandidates, select_candidates)
bind(dialect.ChooseShared, choose_shared)
bind(dialect.ChooseHeads, choose_heads)
bind(dialect.PackHeads, pack_heads)
bind(dialect.MapPositions, map_positions)
bind(dialect.AddLookahead, add_lookahead)
