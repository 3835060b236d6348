"""Recurrent hybrids: exact at a covering budget; below it full attention is pruned and states stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrids import HYBRIDS, hybrid, states_of
from support import call, run
from three_methods import COVERING, PROMPTS, SNAP, SPEC, C, Models, W, check_rows_alone, new_cache
from transformers import DynamicCache

import specpass


@pytest.fixture(scope="module", params=HYBRIDS)
def models(request: pytest.FixtureRequest) -> Models:
    return Models(hybrid, request.param)


@pytest.mark.parametrize("early_exit", [True, False])
def test_covering_budget_is_exact(models: Models, early_exit: bool) -> None:
    model = models.compiled[COVERING]
    for ids in PROMPTS:
        ours = run(model, ids, past_key_values=new_cache(COVERING, model, early_exit=early_exit))
        theirs = run(models.plain, ids)
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [SNAP, SPEC], ids=["snapkv", "speckv"])
def test_states_are_those_behind_the_prompt(models: Models, method: Any) -> None:
    model, plain = models.compiled[method], DynamicCache(config=models.plain.config)
    cache = new_cache(method, model)
    ours = call(model, PROMPTS[0], cache)
    torch.testing.assert_close(ours, call(models.plain, PROMPTS[0], plain), atol=1e-4, rtol=1e-4)
    found, expected = states_of(cache), states_of(plain)
    assert len(found) == len(expected) > 0
    for state, own in zip(found, expected, strict=True):
        torch.testing.assert_close(state, own, atol=1e-6, rtol=1e-6)
    for layer in cache.budgeted:
        assert (layer.lengths == C).all()
        assert (layer.positions.diff(dim=-1) > 0).all()
        assert torch.equal(layer.positions[..., -W:], torch.arange(60 - W, 60).expand(1, 2, W))


@pytest.mark.parametrize("method", [SNAP, SPEC], ids=["snapkv", "speckv"])
def test_padded_batch_equals_rows(models: Models, method: Any) -> None:
    check_rows_alone(models, method)


def test_report(models: Models) -> None:
    model = models.compiled[SPEC]
    run(model, PROMPTS[0])
    text = str(specpass.report(model))
    kinds = specpass.report(model).prompts[0]
    layers = sum(site.exact == "" for site in kinds.sites)
    assert "interpreted: layer 0 is configured as " in text
    assert f"prompt: {layers} of {layers} attention layers pruned" in text
    assert f"{kinds.states} layers with a state, kept exactly" in text
    assert "the lookahead came behind the prompt" in text
    assert specpass.report(model).data()["prompts"][0]["sites"][0]["budget"] == C
