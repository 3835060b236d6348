"""Fused operators in a whole model, which does not notice; the passes by themselves have files of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import kept, run
from tiny import prompt, tiny

import specpass
from specpass.kernels.dispatch import Choice
from specpass.lowering import fuse_append

pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
METHODS = [
    (specpass.SpecKV(budget=24, window=8, lookahead=4), "inductor"),
    (specpass.SpecPC(24, window=8, lookahead=3), "eager"),
]


@pytest.mark.parametrize(("method", "lowering"), METHODS, ids=["SpecKV", "SpecPC"])
def test_generation_does_not_notice(method: Any, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Target and draft, prefill and steps: the same tokens, kept positions and caches as with nothing fused."""
    ids = prompt(60, seed=1)

    def generate(how: str) -> Any:
        torch._dynamo.reset()
        model = specpass.compile(tiny(layers=1), draft=tiny(seed=1, layers=1), method=method, lowering=how)
        found = run(model, ids, 6)
        return found, [str(choice) for record in specpass.report(model).graphs for _, choice in record.choices]

    with monkeypatch.context() as patch:
        patch.setattr("specpass.lowering.lower.fuse", lambda *_: {})
        theirs, plain = generate("eager")
    monkeypatch.setattr(fuse_append, "choose", lambda operator, operands: Choice(operator, "decode_append", "a test"))
    ours, names = generate(lowering)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    for mine, other in zip(kept(ours.cache), kept(theirs.cache), strict=True):
        assert torch.equal(mine, other)
    assert any("append_attend" in name for name in names)
    assert not any("append_attend" in name or "_lse" in name for name in plain)
