"""The second phase scores what one pass over prompt and lookahead would, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hybrids import HYBRIDS, hybrid
from support import call, compile_eager, run
from tiny import prompt

import specpass
from specpass.benchmarks.coverage.tiny import tiny_model
from specpass.cache import BudgetCache
from specpass.dialect.define import SPEC
from specpass.interpret.keep import Keeper
from specpass.interpret.lookahead import reads_initial_states
from specpass.interpret.prompt import ReadPrompt
from specpass.interpret.rows import Packing
from specpass.interpret.run import listening

W, C, L, S = 8, 24, 6, 52
AHEAD = prompt(L, seed=7)
METHOD = specpass.SpecKV(budget=C, window=W, lookahead_ids=AHEAD)


class Spy(ReadPrompt):
    """One pass over prompt and lookahead; keeps each site's query, key and value."""

    def __init__(self, cache: BudgetCache, keeper: Keeper) -> None:
        super().__init__(cache, keeper, ahead=False)
        self.seen: list[tuple[Any, Any, Any, float]] = []

    def attend(self, layer: int, call: Any, made: bool) -> Any:
        self.seen.append((call.query, *self.open[layer], call.scale))
        return super().attend(layer, call, made)


def seen(model: Any, ids: Any) -> list[tuple[Any, Any, Any, float]]:
    """Query, key, value and scale of each attention layer, of one forward over prompt and lookahead."""
    cache = BudgetCache(model.config, METHOD, 8)
    both = torch.cat([ids, AHEAD], 1)
    spy = Spy(cache, Keeper(cache, Packing.of(both, None), short=True))
    cache.columns = 0
    with torch.no_grad(), listening(cache, spy), spy.watch:
        model._call_impl(input_ids=both, past_key_values=cache, use_cache=True)
    return spy.seen


def one_pass(model: Any, ids: Any) -> list[Any]:
    """[B, K, C] of each attention layer, by one forward over prompt and lookahead."""
    lengths = torch.tensor([S])
    rows = SPEC.score_rows(lengths, AHEAD, W, [])
    scores = []
    for query, key, _, scale in seen(model, ids):
        scores.append(SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, scale, "max"))
    return [SPEC.select(found, lengths, C, W, 7, "max") for found in scores]


def test_outputs_that_lose_are_those_of_one_pass() -> None:
    """reconstruction=True, whose rows lie in two calls here."""
    method = dataclasses.replace(METHOD, reconstruction=True)
    model, plain = compile_eager(hybrid("lfm2"), method), compile_eager(hybrid("lfm2"), METHOD)
    caches = [BudgetCache(each.config, each_method, 8) for each, each_method in ((model, method), (plain, METHOD))]
    for each, cache in zip((model, plain), caches, strict=True):
        call(each, prompt(S), cache)
    differ = False
    for layer, other, (query, key, value, scale) in zip(
        *(c.budgeted for c in caches), seen(model, prompt(S)), strict=True
    ):
        rows = SPEC.score_rows(torch.tensor([S]), AHEAD, W, [])
        operands = (SPEC.take_rows(query, rows), key, value, rows, torch.tensor([S]), W, scale, "max")
        expected = SPEC.select(SPEC.reconstruction(*operands), torch.tensor([S]), C, W, 7, "max")
        for ours, theirs in zip(layer.positions[0].tolist(), expected[0].tolist(), strict=True):
            assert len(set(ours) & set(theirs)) >= C - 1, "rounding may change one choice, and no more"
        differ = differ or not torch.equal(layer.positions, other.positions)
    assert differ


@pytest.mark.parametrize("family", HYBRIDS)
def test_positions_are_those_of_one_pass(family: str) -> None:
    model = compile_eager(hybrid(family), METHOD)
    cache = BudgetCache(model.config, METHOD, 8)
    call(model, prompt(S), cache)
    for layer, expected in zip(cache.budgeted, one_pass(model, prompt(S)), strict=True):
        kept = [set(row.tolist()) for row in (*layer.positions[0], *expected[0])]
        heads = layer.positions.shape[1]
        for ours, theirs in zip(kept[:heads], kept[heads:], strict=True):
            assert len(ours & theirs) >= C - 1, "rounding may change one choice, and no more"


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "bamba", "jamba"])
def test_who_takes_several_tokens_behind_a_state(family: str) -> None:
    model = compile_eager(hybrid(family), specpass.SnapKV(budget=C, window=W))
    cache = BudgetCache(model.config, specpass.SnapKV(budget=C, window=W), 8)
    call(model, prompt(S), cache)
    assert reads_initial_states(model, cache.layers) == (family != "jamba")  # Mamba 1's scan starts from zero


def test_states_that_a_model_keeps_in_its_modules_are_the_prompts() -> None:
    """RecurrentGemma's lie in no cache: the lookahead goes on from copies of them, too."""
    method = specpass.SpecKV(budget=24, window=8, lookahead_ids=prompt(4, seed=7))
    model, ids = compile_eager(tiny_model("recurrent_gemma"), method), prompt(22)
    cache = specpass.BudgetCache(model.config, method, 8, early_exit=False)
    ours, theirs = run(model, ids, past_key_values=cache), run(tiny_model("recurrent_gemma"), ids)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)
