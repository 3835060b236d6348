"""Mixture-of-experts decoders: their last layer sorts tokens by expert, and rows are taken in front of that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.testing import eager

C, W, L = 24, 8, 5
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)


def make(family: str) -> Any:
    return tiny(family, **{"layer_types": ["full_attention"] * 2} if family == "gpt-oss" else {})


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny(seed=1000, layers=1)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_kept_sets_answers_and_padded_rows(family: str, draft: Any) -> None:
    torch._dynamo.reset()
    model, twin, ids = compile_eager(make(family), METHOD, draft), make(family), prompt(60, seed=60)
    ours = run(model, ids)
    lookahead, _ = eager.draft_lookahead(draft, ids, L)
    check_rules(kept(ours.cache), 60, C, W)
    check_selection(kept(ours.cache), eager.select(twin, ids, C, lookahead, eager.Scoring(window=W), route="output"), W)
    check_answer(ours, twin, ids, kept(ours.cache))
    rows = [ids, prompt(33, seed=33), prompt(12, seed=12)]
    batch, mask = padded(rows)
    together = run(model, batch, mask=mask)
    for row, own in enumerate(rows):
        alone = run(model, own)
        assert together.tokens[row] == alone.tokens[0]
        for first, second in zip(kept(together.cache, row), kept(alone.cache), strict=True):
            assert torch.equal(first, second)
    assert not specpass.report(model).refusals
    assert not specpass.report(model).interpreted  # tried on a few rows, with a lookahead behind the prompt


@pytest.mark.parametrize("count", [0, 3])
def test_logits_of_several_positions(count: int, draft: Any) -> None:
    torch._dynamo.reset()
    model, twin = compile_eager(make("olmoe"), METHOD, draft), make("olmoe")
    ids, mask = padded([prompt(60, seed=1), prompt(37, seed=2)])
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=6)
    full = call(
        twin, ids, None, attention_mask=mask, logits_to_keep=count, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )
    ours = call(model, ids, cache, attention_mask=mask, logits_to_keep=count)
    real = mask.bool()[:, -ours.shape[1] :]
    torch.testing.assert_close(ours[real], full[real], atol=1e-4, rtol=1e-4)


class Centred(torch.nn.Module):
    """Like experts it works on [B * T, E], but each token's result depends on all tokens."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, 1)
        return (rows - rows.mean(0)).reshape(hidden.shape)


def test_a_layer_that_mixes_tokens_is_left_to_the_models_own_forward(draft: Any) -> None:
    def mixing() -> Any:
        model = tiny()
        model.model.layers[-1].mlp = Centred()
        return model

    torch._dynamo.reset()
    model, ids = compile_eager(mixing(), METHOD, draft), prompt(C - 1, seed=1)
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=6, early_exit=False)
    assert run(model, ids, past_key_values=cache).tokens == run(mixing(), ids).tokens
    assert "mixes positions behind the last attention site" in str(specpass.report(model))
