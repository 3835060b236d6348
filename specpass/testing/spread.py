"""Budgets that KV heads or layers share, in plain eager PyTorch: what is kept, and attention over it alone.

Nothing is compacted here: the cache is whole, and what a head does not keep is masked. Batch 1, nothing of specpass.
Source: AdaKV (arXiv 2407.11550). Symbols as in eager.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specpass.testing.attention import sdpa_replaced

Kept = Sequence[Sequence[torch.Tensor]]  # of each layer and KV head, positions, ascending


def choose(scores: Sequence[torch.Tensor], length: int, budget: int, window: int, floor: float = 0.2) -> list[Any]:
    """What the KV heads of all of `scores` keep together: of each layer and head the positions, with the window.

    Args: scores: pooled, [K, S - W] of each layer that shares: one for `heads`, all of them for `global`.
    """
    least, items = int(floor * (budget - window)), []
    for layer, own in enumerate(scores):
        for head, row in enumerate(own.tolist()):
            ranked = sorted(range(len(row)), key=lambda at: (-row[at], at))
            items += [(rank >= least, -row[at], layer, head, at) for rank, at in enumerate(ranked)]
    total = sum(len(own) for own in scores) * (budget - window)
    tail = range(max(0, length - window), length)
    kept: list[Any] = [[[*tail] for _ in own] for own in scores]
    for _, _, layer, head, at in sorted(items)[:total]:
        kept[layer][head].append(at)
    return [[torch.tensor(sorted(head)) for head in layer] for layer in kept]


@contextmanager
def reading_only(kept: Kept, length: int, whole: int = 0) -> Iterator[None]:
    """Let models with attn_implementation="sdpa" read of a prompt of `length` tokens only what each KV head keeps.

    Args: whole: tokens behind the prompt in front of which all is read still (verified lookahead).
    """
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        columns, (_, heads, count, _) = key.shape[2], query.shape
        if columns <= length + whole:
            return plain(module, query, key, value, attention_mask, **kwargs)
        own = kept[module.layer_idx]
        mask = torch.zeros(len(own), columns, dtype=torch.bool)
        mask[:, length:] = True
        for head, positions in enumerate(own):
            mask[head, positions] = True
        rows = torch.arange(columns - count, columns)[:, None]
        causal = torch.arange(columns) <= rows  # [q, T]
        mask = mask.repeat_interleave(heads // len(own), 0)[None, :, None] & causal
        return plain(module, query, key, value, mask, **{**kwargs, "is_causal": False})

    with sdpa_replaced(attend):
        yield


def margin(scores: torch.Tensor, kept: Sequence[torch.Tensor], budget: int, window: int, floor: float = 0.2) -> float:
    """Smallest kept less largest dropped score of K heads that share: >= -1e-6 for a right choice of K (C - W) of them.

    What a head keeps by its floor is compared with its own dropped ones alone.

    Args: scores: pooled, [K, S - W]; K may be the heads of several layers.
    """
    least = int(floor * (budget - window))
    chosen = [head[: len(head) - window] for head in kept]
    assert sum(map(len, chosen)) == len(scores) * min(budget - window, scores.shape[1])
    assert min(map(len, chosen)) >= min(least, scores.shape[1])
    dropped = torch.tensor(
        [
            float(row[~torch.isin(torch.arange(len(row)), own)].amax()) if len(own) < len(row) else -1.0
            for row, own in zip(scores, chosen, strict=True)
        ]
    )
    found = [
        float(row[own].amin()) - float(dropped[head])
        for head, (row, own) in enumerate(zip(scores, chosen, strict=True))
    ]
    free = [
        float(row[own].amin()) - float(dropped.max())
        for row, own in zip(scores, chosen, strict=True)
        if len(own) > least
    ]
    return min(found + free)
