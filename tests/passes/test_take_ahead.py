"""take_ahead: the logits behind each lookahead token, of the target's own prefill."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SNAPKV, SPECKV, L, State, check_contract
from support import call
from tiny import tiny
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.operands import results_of
from specpass.passes.facts import Ahead, Drafted
from specpass.passes.take_ahead import TakeAhead


def state_before(**options: Any) -> State:
    return prompt_graph(SPECKV, verify=True, **options).before("take_ahead")


def difference(state: State) -> str:
    before = copy_module(state.gm)
    return changes(before, state.apply(TakeAhead()).gm)


def test_text() -> None:
    assert_expected_inline(
        difference(state_before()),
        """\
+ahead_index(full_lengths, 4)
+take_positions(slice, ahead_index)
+linear(take_positions, lm_head_weight)""",
    )


def test_count() -> None:
    for keep in (1, 0):
        state = state_before(mask=True, layers=2, keep=keep).apply(TakeAhead())
        check_count(state.gm, ahead_index=1, take_positions=2, prefill_attention=2)
        assert state.facts[Ahead].tokens == L


def test_numbers_are_the_targets_own_behind_the_lookahead() -> None:
    for keep in (1, 0):
        state = state_before(mask=True, keep=keep).apply(TakeAhead())
        state.results.append("ahead")
        state.returning(lookahead=state.facts[Drafted].ids)
        found = state.run(IDS, HANDLE, MASK)
        for row, length in enumerate(LENGTHS):
            whole = torch.cat([IDS[[row], -length:], found["lookahead"][[row]]], 1)
            expected = call(tiny(layers=1), whole, None, logits_to_keep=L)[0]
            torch.testing.assert_close(found["ahead"][row], expected, atol=1e-4, rtol=1e-4)


def test_leaves_what_has_no_lookahead() -> None:
    state = prompt_graph(SNAPKV, verify=True).before("take_ahead")
    assert difference(state) == ""
    assert "no lookahead" in state.facts[Ahead].why


def test_leaves_a_call_that_returns_more_than_logits() -> None:
    state = state_before()
    state.returning(hidden=results_of(state.gm.graph)[0].all_input_nodes[0])
    assert difference(state) == ""
    assert "more than logits" in state.facts[Ahead].why


def test_leaves_graphs_that_are_not_asked() -> None:
    assert difference(prompt_graph(SPECKV).before("take_ahead")) == ""


def test_alone() -> None:
    state = check_contract(TakeAhead(), state_before, Drafted)
    assert state.facts[Ahead].tokens == L
