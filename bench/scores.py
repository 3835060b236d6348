"""What a lookahead's and a window's attention can be made into scores by, beside SpecKV's own: an ablation.

Each is a function of p [B, K, G, R, T], the probabilities of the rows that score, as its paper gives it.
Symbols: B batch, K KV heads, G query heads of each, R rows (window and lookahead), T columns, D head dimension,
v values.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specpass import SpecKV

SINKS = 4  # first columns, which rows attend to whatever they ask


def probabilities(query: Tensor, key: Tensor, rows: Tensor, scale: float) -> Tensor:
    """[B, K, G, R, T] float32 of query [B, K * G, R, D] at rows [B, R] (-1: none, zeros), key [B, K, T, D]."""
    asked = query.unflatten(1, (key.shape[1], -1)).float()
    logits = torch.einsum("bkgrd,bktd->bkgrt", asked, key.float()) * scale
    column = torch.arange(key.shape[2], device=key.device)
    hidden = (column > rows[:, :, None])[:, None, None]
    live = (rows >= 0)[:, None, None, :, None]
    return torch.where(live, logits.masked_fill(hidden & live, float("-inf")).softmax(-1), 0.0)


def outside(lengths: Tensor, window: int, columns: int) -> Tensor:
    """[B, 1, T]: columns in a row's window and behind it, which no score decides about."""
    return torch.arange(columns, device=lengths.device) >= (lengths - window)[:, None, None]


@dataclasses.dataclass(frozen=True)
class MeanRows(SpecKV):
    """The mean over rows, then the most over the query heads of a KV head."""

    def score(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        return probabilities(query, key, rows, scale).mean(3).amax(2)


@dataclasses.dataclass(frozen=True)
class WithoutSinks(SpecKV):
    """Rows are renormalised over the columns that are neither sinks nor in the window; sinks always stay,
    and with them what pooling puts beside them."""

    def score(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        p = probabilities(query, key, rows, scale)
        sink = torch.arange(p.shape[-1], device=p.device) < SINKS
        p = p.masked_fill((outside(lengths, self.window, p.shape[-1]) | sink)[:, :, None, None], 0.0)
        return (p / p.sum(-1, keepdim=True).clamp(min=1e-9)).amax((2, 3)).masked_fill(sink, 2.0)


@dataclasses.dataclass(frozen=True)
class Defensive(SpecKV):
    """The most over rows and heads, at least its mean over columns, times the values' norms (DefensiveKV, arXiv
    2510.13334, and its published code, which weighs by the norms behind the output projection).
    """

    def score(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        most = probabilities(query, key, rows, scale).amax((2, 3))
        gone = outside(lengths, self.window, most.shape[-1])
        count = (~gone).sum(-1, keepdim=True).clamp(min=1)
        risk = most.maximum(most.masked_fill(gone, 0.0).sum(-1, keepdim=True) / count)
        return risk * value.float().norm(dim=-1)


SCORES: dict[str, type[SpecKV]] = {"mean rows": MeanRows, "without sinks": WithoutSinks, "defensive": Defensive}
