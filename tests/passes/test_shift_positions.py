"""shift_positions: steps count as the target was told to."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, SNAPKV, SPECPC, check_contract, stored
from traces import step_graph

from specpass.graph.edit import copy_module
from specpass.passes.facts import Inputs
from specpass.passes.shift_positions import ShiftPositions

TOKENS, SHIFT = torch.tensor([[5], [9]]), torch.tensor([36, 19])


def difference(**options: bool) -> str:
    state = step_graph(SPECPC, **options).before("shift_positions")
    before = copy_module(state.gm)
    return changes(before, state.apply(ShiftPositions()).gm)


def test_text_of_given_positions() -> None:
    assert_expected_inline(
        difference(positions=True, shift=True),
        """\
+told_positions(position_ids, shift)
-unsqueeze(position_ids, 2)
+unsqueeze(told_positions, 2)
-advance(seen, shift, 1)
+advance(seen, None, 1)""",
    )


def test_text_of_the_caches_own_count() -> None:
    assert_expected_inline(
        difference(shift=True),
        """\
+told_length(seen, shift)
-add(arange, seen)
+add(arange, told_length)
-advance(seen, shift, 1)
+advance(seen, None, 1)""",
    )


def test_count() -> None:
    state = step_graph(SPECPC, positions=True, shift=True, layers=2).after("shift_positions")
    check_count(state.gm, ["told_length"], told_positions=1, advance=1, append_kv=2)
    state = step_graph(SPECPC, shift=True, layers=2).after("shift_positions")
    check_count(state.gm, ["told_positions"], told_length=1, advance=1, append_kv=2)


def test_numbers_of_given_positions() -> None:
    """Positions of which the shift is taken are what the model computes of positions less the shift."""
    state = step_graph(SPECPC, positions=True, shift=True).before("shift_positions")
    counted = torch.tensor([[60], [43]])
    expected = state.run(TOKENS, HANDLE, torch.tensor(60), SHIFT, counted - SHIFT[:, None], *stored(24, 24))
    seen = torch.tensor(60)
    found = state.apply(ShiftPositions()).run(TOKENS, HANDLE, seen, SHIFT, counted, *stored(24, 24))
    torch.testing.assert_close(found["logits"], expected["logits"])
    assert int(seen) == 61  # the cache goes on counting the caller's tokens


def test_numbers_of_the_caches_own_count() -> None:
    state, shift = step_graph(SPECPC, shift=True).before("shift_positions"), SHIFT[:1]
    expected = state.run(TOKENS[:1], HANDLE, torch.tensor(60 - 36), shift, *stored(24))
    seen = torch.tensor(60)
    found = state.apply(ShiftPositions()).run(TOKENS[:1], HANDLE, seen, shift, *stored(24))
    torch.testing.assert_close(found["logits"], expected["logits"])
    assert int(seen) == 61


def test_leaves_a_cache_without_a_shift() -> None:
    """Nothing was renumbered."""
    assert difference(positions=True) == ""
    state = step_graph(SNAPKV).before("shift_positions")
    before = copy_module(state.gm)
    assert changes(before, state.apply(ShiftPositions()).gm) == ""


def test_alone() -> None:
    def make() -> object:
        return step_graph(SPECPC, positions=True, shift=True).before("shift_positions")

    check_count(check_contract(ShiftPositions(), make, Inputs).gm, told_positions=1)
    check_count(check_contract(ShiftPositions(), lambda: step_graph(SPECPC, shift=True).fresh()).gm, told_length=1)
