"""Scores of prompt tokens, the tokens that the target reads, and how it counts them, in plain aten (SpecPC).

Symbols: B batch, S prompt length, W window, C prompt tokens that the target reads, n neighbours of a peak, k pooling
kernel. Formulas: arXiv 2506.08373, Algorithm 2, and its public code's order of neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import prompt as dialect
from specpass.ops.bind import bind


def row_weights(lengths: Tensor, window: int) -> Tensor:
    """[W] float32 weights of the window's rows, linspace(0, 1, W): later rows count more; one row counts fully."""
    if window == 1:
        return torch.ones(1, device=lengths.device)
    return torch.linspace(0, 1, window, device=lengths.device)


def no_scores(like: Tensor, kv_heads: int) -> Tensor:
    """Zeros [B, T] float32 to start a reduction with; like [B, K * T, ...]."""
    return torch.zeros(like.shape[0], like.shape[1] // kv_heads, device=like.device)


def merge_layer(total: Tensor, scores: Tensor, reduce: str) -> Tensor:
    """One layer more: [B, T] with scores [B, K, T] reduced over the KV heads ("max" or "sum")."""
    if reduce == "max":
        return torch.maximum(total, scores.amax(1))
    return total + scores.sum(1)


def merge_step(total: Tensor, scores: Tensor, reduce: str) -> Tensor:
    """One decode step more: [B, S] with the prompt's columns of scores [B, P]."""
    prompt = scores[:, : total.shape[1]]
    return torch.maximum(total, prompt) if reduce == "max" else total + prompt


def select_prompt(
    scores: Tensor, lengths: Tensor, budget: int, window: int, kernel: int, neighbours: int, pool: str
) -> Tensor:
    """Scores -> the C prompt tokens to read: the last W, then peaks with their neighbours, best peak first.

    Args: scores [B, S] float32, >= 0 and 0 behind a row's prompt; lengths [B].
    Returns: positions [B, C] int64, ascending; rows shorter than C keep everything, unused slots -1.

    A position's rank is its first place in the list (window, peak 0 at offsets 0, -1, +1, -2, ..., peak 1 ...): the C
    smallest ranks are what dropping repeats and cutting to C leaves.
    """
    batch, columns = scores.shape
    device = scores.device
    last = (lengths - 1)[:, None]
    left = (kernel - 1) // 2
    padded = F.pad(scores[:, None], (left, kernel - 1 - left))
    pooled = (F.max_pool1d if pool == "max" else F.avg_pool1d)(padded, kernel, 1)[:, 0]
    column = torch.arange(columns, device=device)
    pooled = pooled.masked_fill(column > last, -1.0)
    pooled = F.pad(pooled, (0, budget), value=-1.0)  # the prompt may be shorter than C
    values, peaks = torch.sort(pooled, dim=-1, descending=True, stable=True)  # ties go to the lower position
    peaks, real = peaks[:, :budget], values[:, :budget] >= 0
    offsets = sorted(range(-((neighbours - 1) // 2), neighbours - (neighbours - 1) // 2), key=lambda o: (abs(o), o))
    listed = peaks[:, :, None] + torch.tensor(offsets, device=device)
    listed = torch.minimum(listed.clamp(min=0), last[:, :, None]).flatten(1)  # [B, C * n]
    never = columns + budget * neighbours  # behind every rank in the list
    rank = torch.arange(budget * neighbours, device=device).expand(batch, -1)
    rank = rank.masked_fill(~real.repeat_interleave(neighbours, 1), never)
    first = torch.full((batch, columns + budget), never, device=device)
    first = first.scatter_reduce(1, listed, rank, "amin")
    place = torch.arange(columns + budget, device=device)
    first = torch.where((place > last - window) & (place <= last), -1, first)
    best = torch.sort(first, dim=-1, stable=True)
    chosen = best.indices[:, :budget].masked_fill(best.values[:, :budget] == never, never).sort(-1).values
    return chosen.masked_fill(chosen >= never, -1)


def take_ids(ids: Tensor, positions: Tensor) -> Tensor:
    """[B, S] packed ids at positions [B, C] (-1 reads position 0, behind the row's last token) -> [B, C]."""
    return ids.gather(1, positions.clamp(min=0))


def count_kept(positions: Tensor) -> Tensor:
    """[B] int64: used slots of positions [B, C]."""
    return (positions >= 0).sum(1)


def number_anew(positions: Tensor) -> Tensor:
    """Positions 0 .. C - 1 of the C tokens that the target reads: [B, C] -> [B, C]."""
    return torch.arange(positions.shape[1], device=positions.device).expand(positions.shape).contiguous()


def told_positions(position_ids: Tensor, shift: Tensor) -> Tensor:
    """Positions [B or 1, q] as the caller counts them -> [B, q] as the target was told, shift [B] less."""
    return position_ids - shift[:, None]


def told_length(seen: Tensor, shift: Tensor) -> Tensor:
    """The same for the cache's 0-d length: without padding all rows have one shift [B]."""
    return seen - shift[0]


bind(dialect.RowWeights, row_weights)
bind(dialect.NoScores, no_scores)
bind(dialect.MergeLayer, merge_layer)
bind(dialect.MergeStep, merge_step)
bind(dialect.SelectPrompt, select_prompt)
bind(dialect.TakeIds, take_ids)
bind(dialect.CountKept, count_kept)
bind(dialect.NumberAnew, number_anew)
bind(dialect.ToldPositions, told_positions)
bind(dialect.ToldLength, told_length)
