"""attend_branches: several futures behind one prompt, none of which sees the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SPECKV, L, State, W, check_contract
from traces import draft, prompt_graph

from specpass.dialect.branches import AttendBranches as Branched
from specpass.graph.edit import copy_module
from specpass.graph.walk import value
from specpass.passes.attend_branches import AttendBranches
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Branches, Drafted
from specpass.rewrite import Refusal, Request
from specpass.rewrite.sites import Alibi, Sites

M = 3
FUTURES = dataclasses.replace(SPECKV, futures=M)


def futures(before: str, **options: Any) -> State:
    """A prompt's graph with M futures, in front of a pass."""
    graph = prompt_graph(FUTURES, positions=True, **options)
    state = graph.fresh()
    if DraftGraphs in state.facts:
        state.facts.add(dataclasses.replace(draft(), futures=M))
    return state.apply(*graph.passes[: graph._index(before)])


def told(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def test_text() -> None:
    state = futures("attend_branches", mask=True)
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(AttendBranches()).gm),
        """\
-reshape(prefill_attention, [sym_size, -1, sym_size, 16])
+attend_branches(prefill_attention, add, add, transpose, pack_order[1], 8, 4, 3, 0.25)
+reshape(attend_branches[0], [sym_size, -1, sym_size, 16])""",
    )


def test_text_of_the_draft() -> None:
    before = prompt_graph(SPECKV, positions=True).after("insert_draft").gm
    assert_expected_inline(
        changes(before, futures("gather_prompt").gm),
        """\
-zeros_like(full_lengths)
+repeat_interleave(full_lengths, 3, 0)
+zeros_like(repeat_interleave)
-next_token(draft_prefill[0], to, 128, 0.0, 0, 0, [], 0)
-add(full_lengths, 0)
+repeat_interleave(draft_prefill[1], 3, 0)
+repeat_interleave(draft_prefill[2], 3, 0)
+repeat_interleave(draft_prefill[3], 3, 0)
+repeat_interleave(draft_prefill[0], 3, 0)
+next_tokens(repeat_interleave, to, 3, 128, [], 0)
+add(repeat_interleave, 0)
-draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
-next_token(draft_step, next_token[1], 128, 0.0, 0, 1, [], 0)
-add(full_lengths, 1)
+draft_step(next_tokens[0], unsqueeze, repeat_interleave, repeat_interleave, repeat_interleave)
+next_tokens(draft_step, next_tokens[1], 3, 128, [], 0)
+add(repeat_interleave, 1)
-draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
-next_token(draft_step, next_token[1], 128, 0.0, 0, 2, [], 0)
-add(full_lengths, 2)
+draft_step(next_tokens[0], unsqueeze, repeat_interleave, repeat_interleave, repeat_interleave)
+next_tokens(draft_step, next_tokens[1], 3, 128, [], 0)
+add(repeat_interleave, 2)
-draft_step(next_token[0], unsqueeze, draft_prefill[1], draft_prefill[2], draft_prefill[3])
-next_token(draft_step, next_token[1], 128, 0.0, 0, 3, [], 0)
-cat([next_token[0], next_token[0], next_token[0], next_token[0]], 1)
-append_ids(input_ids, cat, full_lengths)
-append_positions(position_ids, full_lengths, 4)
+draft_step(next_tokens[0], unsqueeze, repeat_interleave, repeat_interleave, repeat_interleave)
+next_tokens(draft_step, next_tokens[1], 3, 128, [], 0)
+cat([next_tokens[0], next_tokens[0], next_tokens[0], next_tokens[0]], 1)
+reshape(cat, [-1, 12])
+slice(reshape, 1, 0, 4)
+append_ids(input_ids, reshape, full_lengths)
+append_positions(position_ids, full_lengths, 4, 3)""",
    )


def test_count() -> None:
    state = futures("gather_prune", layers=2)
    check_count(state.gm, ["next_token"], attend_branches=2, prefill_attention=2, importance=2, next_tokens=L)


def test_numbers_are_those_of_a_prompt_with_one_branch() -> None:
    """Each branch's attention is that of the target behind prompt and branch alone; the prompt's stays."""
    state = futures("score_importance", mask=True)
    (site,) = Branched.find(state.gm.graph)
    out = next(user for user in site.node.users if user.args[1] == 0)
    found = state.returning(out=out, plain=site.attention, tokens=state.facts[Drafted].read).run(
        IDS, HANDLE, MASK, told(MASK)
    )
    rows = torch.zeros_like(found["out"][0, 0, :, 0], dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        rows[:] = False
        rows[: length + L] = True
        assert torch.equal(found["out"][row][:, rows], found["plain"][row][:, rows])
        for branch, ids in enumerate(found["tokens"][row].view(M, L)):
            alone = prompt_graph(SPECKV).before("insert_draft")
            (attention,) = (node for node in alone.gm.graph.nodes if "prefill_attention" in str(node.target))
            prompt = torch.cat([IDS[row, -length:], ids])[None]
            expected = alone.returning(out=attention).run(prompt, HANDLE)["out"][0, :, length:]
            start = length + branch * L
            torch.testing.assert_close(found["out"][row, :, start : start + L], expected, atol=1e-5, rtol=1e-4)


def test_leaves_one_future_and_refuses_a_bias() -> None:
    assert not AttendBranches().applies(Request("prefill", SPECKV, L))
    assert not AttendBranches().applies(Request("prefill", FUTURES, 0))
    assert AttendBranches().applies(Request("prefill", FUTURES, L))
    state = futures("attend_branches")
    state.facts.add(_with_alibi(state))
    with pytest.raises(Refusal, match="ALiBi"):
        AttendBranches().run(state.gm, state.request, state.facts)


def test_leaves_out_what_is_told_no_positions() -> None:
    graph = prompt_graph(FUTURES)
    with pytest.raises(Refusal, match="no position_ids are given"):
        graph.after("insert_draft")


def _with_alibi(state: State) -> Sites:
    (site,) = state.facts[Sites].sites
    return Sites((dataclasses.replace(site, alibi=Alibi(site.query, torch.float32, 1.0)),))


def test_alone() -> None:
    state = check_contract(AttendBranches(), lambda: futures("attend_branches"))
    assert [tuple(value(node).shape[2:]) for node in state.facts[Branches].lse] == [(W + M * L,)]
