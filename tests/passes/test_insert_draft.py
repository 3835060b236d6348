"""insert_draft: the draft in front of the target, and its tokens behind the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, short, text
from graphs import HANDLE, IDS, LENGTHS, MASK, SPECKV, SPECPC, C, L, W, assert_same, check_contract
from tiny import tiny
from traces import prompt_graph

import specpass
from bench.fuzz import formulas
from specpass.graph.edit import copy_module
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Drafted, Inputs
from specpass.passes.insert_draft import InsertDraft
from specpass.rewrite import Refusal, Request
from specpass.testing import eager

NGRAM = specpass.SpecKV(budget=C, window=W, lookahead="ngram")
AHEAD = torch.cat(
    [eager.draft_lookahead(tiny(seed=1, layers=1), IDS[[row], -length:], L)[0] for row, length in enumerate(LENGTHS)]
)


def test_text() -> None:
    state = prompt_graph(SPECKV, positions=True).after("insert_draft")
    assert_expected_inline(
        text(state.gm),
        """\
full_lengths(input_ids)
draft_prefill(input_ids, full_lengths, 4)
next_token(draft_prefill[0], to, 128, 0.0, 0, 0, [], 0)
draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
next_token(draft_step, next_token[1], 128, 0.0, 0, 1, [], 0)
draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
next_token(draft_step, next_token[1], 128, 0.0, 0, 2, [], 0)
draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
next_token(draft_step, next_token[1], 128, 0.0, 0, 3, [], 0)
append_ids(input_ids, cat, full_lengths)
append_positions(position_ids, full_lengths, 4)
fill(add, transpose, handle, 24, 64, 0, False)
size(input_ids, 1)
prefill_attention(add, add, transpose, 0.25)""",
    )


def test_text_of_a_scoring_draft() -> None:
    state = prompt_graph(SPECPC).after("insert_draft")
    assert_expected_inline(
        text(state.gm),
        """\
full_lengths(input_ids)
draft_prefill(input_ids, full_lengths, 3)
next_token(draft_prefill[0], to, 128, 0.0, 0, 0, [], 0)
draft_step(next_token[0], unsqueeze, masked_fill, full_lengths, draft_prefill[1], draft_prefill[2], draft_prefill[3])
merge_step(draft_prefill[4], draft_step[1], max)
next_token(draft_step[0], next_token[1], 128, 0.0, 0, 1, [], 0)
draft_step(next_token[0], unsqueeze, masked_fill, full_lengths, draft_prefill[1], draft_prefill[2], draft_prefill[3])
merge_step(merge_step, draft_step[1], max)
next_token(draft_step[0], next_token[1], 128, 0.0, 0, 2, [], 0)
read_prompt(add)
fill(add, transpose, handle, 24, 64, 0, False)
size(input_ids, 1)
prefill_attention(add, add, transpose, 0.25)""",
    )


def test_count() -> None:
    state = prompt_graph(SPECKV, mask=True, layers=2).after("insert_draft")
    check_count(state.gm, ["lookahead"], draft_prefill=1, draft_step=L - 1, next_token=L, append_ids=1, fill=2)
    state = prompt_graph(SPECPC, layers=2).after("insert_draft")
    gone = ["lookahead", "append_ids"]  # a compressed prompt is gathered first
    check_count(state.gm, gone, draft_prefill=1, draft_step=2, next_token=3, merge_step=2, fill=2)


def test_numbers_of_the_lookahead_are_the_drafts() -> None:
    state = prompt_graph(SPECKV, mask=True).after("insert_draft")
    assert torch.equal(state.run(IDS, HANDLE, MASK)["lookahead_ids"], AHEAD)
    whole = AHEAD[:1]  # of the row without padding
    assert torch.equal(prompt_graph(SPECKV).after("insert_draft").run(IDS[:1], HANDLE)["lookahead_ids"], whole)


@pytest.mark.parametrize("positions", [False, True])
def test_numbers_of_the_target_are_those_of_a_longer_prompt(positions: bool) -> None:
    """With the lookahead behind the prompt it computes what it computes of both as one prompt."""
    state, ids = prompt_graph(SPECKV, positions=positions).before("insert_draft"), IDS[:1]
    size = ids.shape[1]

    def told(length: int) -> list[torch.Tensor]:
        return [torch.arange(length)[None]] if positions else []

    longer = state.run(torch.cat([ids, AHEAD[:1]], 1), HANDLE, *told(size + L))
    found = state.apply(InsertDraft()).run(ids, HANDLE, *told(size))
    assert int(found["seen"]) == size  # the cache counts the caller's tokens
    for name in ("lookahead_ids", "seen"):
        del longer[name], found[name]
    assert_same(found, longer)


def test_numbers_of_given_ids_stand_in_the_drafts_place() -> None:
    given = ((7, 8, 9, 10),)
    state = prompt_graph(specpass.SpecKV(budget=C, window=W, lookahead_ids=given)).after("insert_draft")
    check_count(state.gm, ["draft_prefill", "next_token"], lookahead=1, append_ids=1)
    assert state.run(IDS[:1], HANDLE, torch.tensor(given))["lookahead_ids"].tolist() == [list(given[0])]


def test_a_prompt_that_is_looked_up() -> None:
    state = prompt_graph(NGRAM, mask=True).after("insert_draft")
    check_count(state.gm, ["draft_prefill", "next_token", "lookahead"], prompt_lookup=1, append_ids=1)
    ids = IDS % 11  # of which each was there before
    found = state.run(ids, HANDLE, MASK)["lookahead_ids"]
    for row, length in enumerate(LENGTHS):
        assert found[row].tolist() == formulas.looked_up(ids[row, -length:].tolist(), state.request.lookahead)


def test_leaves_a_prompt_that_fits_and_methods_without_lookahead() -> None:
    for kind, lookahead in (("short", 0), ("prefill", 0)):
        assert not InsertDraft().applies(Request(kind, SPECKV, lookahead))
    assert InsertDraft().applies(Request("prefill", SPECKV, 1))
    state = prompt_graph(SPECKV, kind="short").before("insert_draft")
    before = copy_module(state.gm)
    assert changes(before, state.apply(InsertDraft()).gm) == ""


def test_leaves_a_prompt_whose_length_is_a_constant() -> None:
    state = prompt_graph(SPECKV).before("insert_draft")
    ids = state.facts[Inputs].tokens
    with ids.meta["val"].fake_mode:
        ids.meta["val"] = torch.zeros(3, 60, dtype=torch.int64)
    with pytest.raises(Refusal, match="the prompt length is a constant of the graph; compile with dynamic=True"):
        state.apply(InsertDraft())


def test_alone() -> None:
    def make() -> Any:
        return prompt_graph(SPECKV, mask=True).before("insert_draft")

    drafted = check_contract(InsertDraft(), make, DraftGraphs).facts[Drafted]
    assert (short(drafted.ids), drafted.scores) == ("cat", None)
    assert list(drafted.lifted) == ["draft_" + name.replace(".", "_") for name in make().facts[DraftGraphs].params]
