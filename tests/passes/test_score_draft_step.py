"""score_draft_step: a generated token's attention to each slot, in the draft's own layers."""

from __future__ import annotations

import dataclasses

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import IDS, SPECPC, check_contract
from tiny import tiny
from traces import draft_graphs

import specpass.testing.prompt as oracle
from specpass.graph.edit import copy_module
from specpass.passes.score_draft import ScoreDraftStep

LAYERS = 3
NAMES = [field.name for field in dataclasses.fields(oracle.PromptScoring)]
HOW = oracle.PromptScoring(**{name: getattr(SPECPC, name) for name in NAMES} | {"lookahead": 2})
PASS = ScoreDraftStep(SPECPC)


def test_text() -> None:
    state = draft_graphs(SPECPC)["decode"].before("score_draft_step")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(PASS).gm),
        """\
+no_scores(key_buffer_0, 2)
+importance(add, view, rows, prompt_lengths, 0, 0.25, max, None, None)
+merge_layer(no_scores, importance, max)""",
    )


def test_count() -> None:
    state = draft_graphs(SPECPC, LAYERS)["decode"].after("score_draft_step")
    check_count(state.gm, ["take_rows", "row_weights"], no_scores=1, importance=2, merge_layer=2, attend=3, append_kv=3)


def test_numbers_are_the_eager_scores_of_the_second_token() -> None:
    ids = IDS[:1]
    lengths = torch.tensor([ids.shape[1]])
    prefill = draft_graphs(SPECPC, LAYERS)["prefill"].after("score_draft_prefill")
    prefill.results.append("scores")
    first = prefill.run(ids, lengths, 4)
    logits, scores = first.pop("logits"), first.pop("scores")
    caches = [value.clone() for value in first.values()]
    step = draft_graphs(SPECPC, LAYERS)["decode"].before("score_draft_step")
    rows = lengths[:, None]
    inputs = (logits.argmax(-1), rows, rows, lengths)
    before = step.run(*inputs, *(cache.clone() for cache in caches))
    step.apply(PASS).results.append("scores")
    found = step.run(*inputs, *caches)
    assert torch.equal(found["logits"], before["logits"])
    total = torch.maximum(scores, found["scores"][:, : ids.shape[1]])[0]
    expected = oracle.prompt_scores(tiny(seed=1, layers=LAYERS), ids, HOW)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)


def test_numbers_of_a_sequence_that_has_ended_are_zero() -> None:
    step = draft_graphs(SPECPC)["decode"].after("score_draft_step")
    step.results.append("scores")
    caches = [torch.randn(1, 2 * 64, 16), torch.randn(1, 2 * 64, 16), torch.full((1, 2), 60)]
    found = step.run(torch.tensor([[3]]), torch.tensor([[60]]), torch.tensor([[-1]]), torch.tensor([60]), *caches)
    assert not found["scores"].any()


def test_leaves_prompts() -> None:
    state = draft_graphs(SPECPC)["prefill"].before("score_draft_prefill")
    before = copy_module(state.gm)
    assert changes(before, state.apply(PASS).gm) == ""


def test_alone() -> None:
    state = check_contract(PASS, lambda: draft_graphs(SPECPC)["decode"].before("score_draft_step"))
    check_count(state.gm, importance=1)
