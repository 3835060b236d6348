"""A family plain and under three methods with a given lookahead, and what holds of its padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import compile_eager, padded, run
from tiny import prompt

import specpass

W, C, L = 8, 24, 5
PROMPTS = [prompt(60), prompt(44, seed=1)]
AHEAD = prompt(L, batch=2, seed=7)  # a draft's tokens: who writes them is no matter here
COVERING = specpass.SpecKV(budget=128, window=W, lookahead_ids=AHEAD[:1])
SNAP, SPEC = specpass.SnapKV(budget=C, window=W), specpass.SpecKV(budget=C, window=W, lookahead_ids=AHEAD[:1])


class Models:
    """One family: the plain model, and the same under three methods."""

    def __init__(self, make: Callable[[str], Any], family: str) -> None:
        self.family, self.plain = family, make(family)
        self.compiled = {method: compile_eager(make(family), method) for method in (COVERING, SNAP, SPEC)}


def new_cache(method: Any, model: Any, rows: torch.Tensor = AHEAD[:1], **kwargs: Any) -> specpass.BudgetCache:
    given = {"lookahead_ids": rows} if method.drafts else {}
    return specpass.BudgetCache(model.config, method, 8, **given, **kwargs)


def check_rows_alone(models: Models, method: Any) -> None:
    """Kept positions and tokens of a padded batch are those of its rows."""
    model, (ids, mask) = models.compiled[method], padded(PROMPTS)
    batch = run(model, ids, mask=mask, past_key_values=new_cache(method, model, AHEAD))
    for row, own in enumerate(PROMPTS):
        alone = run(model, own, past_key_values=new_cache(method, model, AHEAD[row : row + 1]))
        assert batch.tokens[row] == alone.tokens[0]
        for layer, single in zip(batch.cache.budgeted, alone.cache.budgeted, strict=True):
            assert torch.equal(layer.positions[row], single.positions[0])
