"""score_draft_prefill: the window's attention to each prompt token, in the draft's own layers."""

from __future__ import annotations

import dataclasses

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import IDS, LENGTHS, MASK, SPECPC, check_contract
from tiny import tiny
from traces import draft_graphs

import specpass.testing.prompt as oracle
from specpass.graph.edit import copy_module
from specpass.ops.rows import pack_ids, pack_order
from specpass.passes.score_draft import ScoreDraftPrefill
from specpass.rewrite.sites import Sites

LAYERS = 3  # of which min(8, 3 // 3) = 1 does not score
NAMES = [field.name for field in dataclasses.fields(oracle.PromptScoring)]
HOW = oracle.PromptScoring(**{name: getattr(SPECPC, name) for name in NAMES} | {"lookahead": 1})
PASS = ScoreDraftPrefill(SPECPC)


def test_text() -> None:
    state = draft_graphs(SPECPC)["prefill"].before("score_draft_prefill")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(PASS).gm),
        """\
+score_rows(prompt_lengths, None, 8, [])
+row_weights(prompt_lengths, 8)
+no_scores(ids, 1)
+take_rows(add, score_rows)
+importance(take_rows, add, score_rows, prompt_lengths, 0, 0.25, max, row_weights, None)
+merge_layer(no_scores, importance, max)""",
    )


def test_count() -> None:
    state = draft_graphs(SPECPC, LAYERS)["prefill"].after("score_draft_prefill")
    there = {"take_rows": 2, "importance": 2, "merge_layer": 2, "prefill_attention": 3, "keep_kv": 3}
    check_count(state.gm, score_rows=1, row_weights=1, no_scores=1, **there)


def test_numbers_are_the_eager_scores_and_the_rest_stays() -> None:
    order, lengths = pack_order(MASK, IDS)
    inputs = (pack_ids(IDS, order), lengths, 4)
    state = draft_graphs(SPECPC, LAYERS)["prefill"].before("score_draft_prefill")
    before = state.run(*inputs)
    state.apply(PASS).results.append("scores")
    found = state.run(*inputs)
    scores = found.pop("scores")
    for name, value in before.items():
        assert torch.equal(found[name], value)
    for row, length in enumerate(LENGTHS):
        expected = oracle.prompt_scores(tiny(seed=1, layers=LAYERS), IDS[[row], -length:], HOW)
        mine = scores[row, :length]
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_leaves_layers_that_do_not_score() -> None:
    state = draft_graphs(SPECPC, LAYERS)["prefill"].after("score_draft_prefill")
    first = state.facts[Sites].sites[0].attention
    assert not [user for user in first.args[0].users if "take_rows" in user.name]


def test_leaves_steps() -> None:
    state = draft_graphs(SPECPC)["decode"].before("score_draft_step")
    before = copy_module(state.gm)
    assert changes(before, state.apply(PASS).gm) == ""


def test_alone() -> None:
    state = check_contract(PASS, lambda: draft_graphs(SPECPC)["prefill"].before("score_draft_prefill"))
    check_count(state.gm, importance=1)
