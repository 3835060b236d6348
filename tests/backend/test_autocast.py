"""Under autocast: what a model makes of its dtypes there is pruned in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compile_eager, kept, run
from tiny import prompt, tiny

import specpass

C, W = 24, 8
DRAFT = tiny(seed=1, layers=1)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("method", "attention"),
    [(specpass.SpecKV(budget=C, window=W, lookahead=4), "sdpa"), (specpass.SnapKV(budget=C, window=W), "eager")],
)
def test_inside_and_outside_of_autocast(method: Any, attention: str) -> None:
    """One model, called in both ways; within the budget it is the plain model, bit for bit of its tokens."""
    settings = {"layers": 1, "attention": attention}
    model, twin = compile_eager(tiny(**settings), method, DRAFT if method.drafts else None), tiny(**settings)
    for _ in range(2):
        outside = run(model, prompt(60), 4)
        assert outside.cache.layers[0].keys.dtype == torch.float32
        with autocast():
            inside, theirs = run(model, prompt(60), 4), run(twin, prompt(60), 4)
            short = run(model, prompt(20), 4)
            torch.testing.assert_close(short.logits, run(twin, prompt(20), 4).logits, atol=0.05, rtol=0.05)
        assert inside.cache.layers[0].keys.dtype == torch.bfloat16
        assert kept(inside.cache)[0].shape == (2, C)
        torch.testing.assert_close(inside.logits[:, 0], theirs.logits[:, 0], atol=0.2, rtol=0.1)
    assert not specpass.report(model).refusals
