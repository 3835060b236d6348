"""Padded batches of direct calls that bring a mask and no positions: each row counts its own tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, compile_eager, padded
from tiny import prompt, tiny
from transformers import DynamicCache, XGLMConfig, XGLMForCausalLM

import specpass

COVERING = specpass.SnapKV(budget=96, window=8)
ROWS = [prompt(40), prompt(29, seed=2)]


def xglm() -> Any:
    """A family whose logits are not understood: exact."""
    sizes = {"d_model": 64, "ffn_dim": 96, "num_layers": 1, "attention_heads": 4, "max_position_embeddings": 512}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = XGLMConfig(vocab_size=128, init_std=0.25, **sizes)
        return XGLMForCausalLM(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["opt", "xglm"])  # OPT counts by the mask itself
def test_rows_as_alone(family: str) -> None:
    make = xglm if family == "xglm" else lambda: tiny(family, layers=1)
    plain, model = make(), compile_eager(make(), COVERING)
    ids, mask = padded(ROWS)
    cache = specpass.BudgetCache(model.config, COVERING, 6, early_exit=False)
    caches = [DynamicCache(config=plain.config) for _ in ROWS]
    for tokens in (None, prompt(1, batch=2, seed=8), prompt(1, batch=2, seed=9)):
        parts = ROWS if tokens is None else tokens.split(1)
        mask = mask if tokens is None else torch.cat([mask, mask.new_ones(2, 1)], 1)
        ours = call(model, ids if tokens is None else tokens, cache, attention_mask=mask)
        alone = torch.cat([call(plain, part, own) for part, own in zip(parts, caches, strict=True)])
        torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-4)
    report = specpass.report(model)
    assert not report.interpreted
    assert bool(report.refusals) == (family == "xglm")
