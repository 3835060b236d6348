"""Layers with a sliding window or chunks among full ones: exact by themselves, and the full ones are pruned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from support import call, check_answer, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.observe.storage import cache_bytes
from specpass.testing import eager

C, W, L, V = 40, 8, 4, 24
SNAP = specpass.SnapKV(budget=C, window=W)
SPEC = specpass.SpecKV(budget=C, window=W, lookahead=L)
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
KINDS = {  # family -> kind of each layer
    "gemma3": (SLIDING, FULL, SLIDING, FULL),
    "gpt-oss": (SLIDING, FULL),
    "gemma2": (SLIDING, FULL),
    "llama4": (CHUNKED, FULL, CHUNKED),
    "mistral-sliding": (SLIDING, SLIDING),
}
# Gemma 2's masks are those of gpt-oss: its choice alone is looked at here, its answers in passes/read/test_logits.py.
WHOLE = [family for family in KINDS if family != "gemma2"]
METHODS = {"gemma3": SPEC, "gpt-oss": SNAP, "gemma2": SNAP, "llama4": SPEC, "mistral-sliding": SNAP}


def model_of(family: str, seed: int = 0) -> Any:
    kinds = {} if family == "mistral-sliding" else {"layer_types": KINDS[family]}
    if family == "llama4":
        kinds["no_rope_layers"] = [int(kind == CHUNKED) for kind in KINDS[family]]
    return tiny(family, layers=len(KINDS[family]), seed=seed, **kinds)


@dataclasses.dataclass
class Subject:
    """A compiled target and its uncompiled twin."""

    family: str
    model: Any
    twin: Any
    method: Any

    def cache(self, new: int = 6, **options: Any) -> specpass.BudgetCache:
        return specpass.BudgetCache(self.model.config, self.method, max_new_tokens=new, **options)


@functools.cache
def subject(family: str) -> Subject:
    """A family has one compiled model for all tests of this file; a draft is of the same family, windows included."""
    torch._dynamo.reset()
    method = METHODS[family]
    draft = model_of(family, seed=1000) if method.drafts else None
    return Subject(family, compile_eager(model_of(family), method, draft), model_of(family), method)


@pytest.fixture(params=WHOLE)
def own(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


def test_only_full_layers_are_pruned_and_the_report_says_why(own: Subject) -> None:
    ids = prompt(60, seed=1)
    cache = own.cache()
    torch.testing.assert_close(call(own.model, ids, cache), call(own.twin, ids, None), atol=1e-4, rtol=1e-4)
    reasons = {SLIDING: f"sliding window {V}", CHUNKED: f"attention in chunks of {V}", FULL: ""}
    report = specpass.report(own.model)
    record = next(graph for graph in report.graphs if graph.kind == "prefill")
    kinds = KINDS[own.family]
    assert [site.exact for site in record.sites] == [reasons[kind] for kind in kinds]
    assert [site.budget for site in record.sites] == [C if kind == FULL else V for kind in kinds]
    assert not report.refusals
    assert all(reason in str(report) for reason in {reasons[kind] for kind in kinds})
    for layer, kind in zip(kept(cache), kinds, strict=True):
        if kind == SLIDING:
            assert layer.tolist() == [list(range(60 - V, 60))] * 2
        elif kind == CHUNKED:
            assert layer.tolist() == [list(range(48, 60))] * 2  # the chunk that the next token belongs to
        else:
            assert layer.shape == (2, C)


def test_storage_is_the_formula(own: Subject) -> None:
    cache = own.cache()
    call(own.model, prompt(90, seed=2), cache)
    slots = sum((C if kind == FULL else V) + cache.room for kind in KINDS[own.family])
    states = 2 * 2 * 16 * 4 * slots  # keys and values, K 2, D 16, float32
    assert states <= cache_bytes(cache) <= 1.05 * states + 8 * 2 * slots  # and int64 positions


@pytest.mark.parametrize(("family", "early_exit"), [*((family, False) for family in WHOLE), ("gemma3", True)])
def test_a_budget_that_holds_the_prompt_is_exact_beyond_the_window(family: str, early_exit: bool) -> None:
    """Prompts on both sides of the window, answers that leave it behind, rows of a padded batch alike."""
    own = subject(family)
    rows = [prompt(length, seed=length) for length in (C, C - 1, V, 7)]
    ids, mask = padded(rows)
    together = run(own.model, ids, 2 * V, mask, past_key_values=own.cache(2 * V, early_exit=early_exit))
    for index, row in enumerate(rows):
        if index in (0, 3):
            alone = run(own.model, row, 2 * V, past_key_values=own.cache(2 * V, early_exit=early_exit))
            full = run(own.twin, row, 2 * V)
            assert alone.tokens == full.tokens
            torch.testing.assert_close(alone.logits, full.logits, atol=1e-4, rtol=1e-4)
        else:
            full = run(own.twin, row, 2 * V)
        assert together.tokens[index] == full.tokens[0]


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "gemma2"])
def test_kept_positions_and_the_answer_are_the_eager_ones(family: str) -> None:
    own, ids = subject(family), prompt(75, seed=3)
    ours = run(own.model, ids)
    how = eager.Scoring(window=W, reduce=own.method.reduce, pool=own.method.pool)
    ahead = ours.cache.lookahead_ids
    route = "capture" if family == "gemma3" else "output"  # the others are eager for their caps and sinks
    theirs = eager.select(own.twin, ids, C, ahead, how, route)
    full = [index for index, kind in enumerate(KINDS[family]) if kind == FULL]
    positions = kept(ours.cache)
    chosen = eager.Selection([theirs.positions[i] for i in full], [theirs.scores[i] for i in full])
    check_selection([positions[i] for i in full], chosen, W)
    if family == "gemma3":  # the eager reference has one mask for all layers, and SDPA needs none of full ones
        every = torch.arange(75).expand(2, -1)
        check_answer(ours, own.twin, ids, [positions[i] if i in full else every for i in range(len(positions))])


def test_turns_beams_and_crops_go_on_behind_the_window(own: Subject) -> None:
    ids = prompt(33, seed=4)
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 2 * V}
    ours = own.model.generate(ids, past_key_values=own.cache(2 * V), **beams)
    assert torch.equal(ours, own.twin.generate(ids, **beams))
    cache, turn = own.cache(64), prompt(V + 5, seed=5)
    call(own.model, ids, cache)
    call(own.model, torch.cat([turn, turn], 1), cache)
    cache.crop(-turn.shape[1])
    got = call(own.model, prompt(3, seed=6), cache)
    whole = torch.cat([ids, turn, prompt(3, seed=6)], 1)
    torch.testing.assert_close(got, call(own.twin, whole, None), atol=1e-4, rtol=1e-4)


def test_a_window_that_a_short_prompts_mask_does_not_show() -> None:
    """A prompt below the window needs no mask, and prompt and lookahead together reach beyond it."""
    own = subject("gemma3")
    ids = prompt(V - 1, seed=7)
    cache = own.cache(early_exit=False)
    torch.testing.assert_close(call(own.model, ids, cache), call(own.twin, ids, None), atol=1e-4, rtol=1e-4)
    assert cache.lookahead_ids is not None
    assert not specpass.report(own.model).refusals
