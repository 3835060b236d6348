"""gather_prompt: which prompt tokens the target reads, by the draft's scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SPECKV, SPECPC, C, check_contract
from tiny import tiny
from traces import prompt_graph

import specpass.testing.prompt as oracle
from specpass.graph.edit import copy_module
from specpass.passes.facts import Drafted, ReadPositions, Rows
from specpass.passes.gather_prompt import GatherPrompt
from specpass.rewrite import Refusal, Request

ORIGINAL = dataclasses.replace(SPECPC, positions="original")
NAMES = [field.name for field in dataclasses.fields(oracle.PromptScoring)]
HOW = oracle.PromptScoring(**{name: getattr(SPECPC, name) for name in NAMES})


def test_text() -> None:
    state = prompt_graph(SPECPC, mask=True).before("gather_prompt")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(GatherPrompt()).gm),
        """\
+select_prompt(merge_step, pack_order[1], 24, 8, 6, 5, max)
+count_kept(select_prompt)
+sub(pack_order[1], count_kept)
-read_prompt(add)""",
    )


def test_text_of_positions_that_keep_their_numbers() -> None:
    state = prompt_graph(ORIGINAL).before("gather_prompt")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(GatherPrompt()).gm),
        """\
+select_prompt(merge_step, full_lengths, 24, 8, 6, 5, max)
+count_kept(select_prompt)
+zeros_like(full_lengths)
-read_prompt(add)""",
    )


def test_count() -> None:
    state = prompt_graph(SPECPC, layers=2).after("gather_prompt")
    check_count(state.gm, ["read_prompt"], select_prompt=1, count_kept=1, draft_step=2, fill=2)


def test_numbers_are_the_eager_choice() -> None:
    found = prompt_graph(SPECPC, mask=True).after("gather_prompt").run(IDS, HANDLE, MASK)
    assert found["shift"].tolist() == [length - C for length in LENGTHS]
    for row, length in enumerate(LENGTHS):
        scores = oracle.prompt_scores(tiny(seed=1, layers=1), IDS[[row], -length:], HOW)
        assert found["prompt_positions"][row].tolist() == oracle.choose(oracle.pooled(scores, HOW), C, HOW)
    kept = prompt_graph(ORIGINAL).after("gather_prompt").run(IDS[:1], HANDLE)
    assert torch.equal(kept["prompt_positions"], found["prompt_positions"][:1])
    assert kept["shift"].tolist() == [0]


def test_leaves_methods_that_read_the_whole_prompt() -> None:
    assert not GatherPrompt().applies(Request("prefill", SPECKV, 4))
    state = prompt_graph(SPECKV).before("gather_prompt")
    before = copy_module(state.gm)
    assert changes(before, state.apply(GatherPrompt()).gm) == ""


def test_leaves_a_draft_that_does_not_score() -> None:
    state = prompt_graph(SPECPC).before("gather_prompt")
    state.facts.add(dataclasses.replace(state.facts[Drafted], scores=None))
    with pytest.raises(Refusal, match="the draft does not score the prompt's tokens"):
        state.apply(GatherPrompt())


def test_alone() -> None:
    state = check_contract(GatherPrompt(), lambda: prompt_graph(SPECPC, mask=True).before("gather_prompt"))
    assert state.facts[ReadPositions].positions.target.name() == "specpass::select_prompt"
    assert state.facts[Rows].lengths.target.name() == "specpass::count_kept"
