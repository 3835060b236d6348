"""take_last: logits of the prompt's own last position, or of every position in the caller's order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SNAPKV, SPECKV, check_contract, insert
from support import call
from tiny import tiny
from traces import draft_graphs, prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.facts import Rows
from specpass.passes.take_last import TakeLast
from specpass.rewrite import Refusal
from specpass.rewrite.sites import Sites


def difference(method: Any, **options: Any) -> str:
    state = prompt_graph(method, **options).before("take_last")
    before = copy_module(state.gm)
    return changes(before, state.apply(TakeLast()).gm)


def test_text_of_the_last_position() -> None:
    assert_expected_inline(
        difference(SPECKV),
        """\
-slice(slice, 1, -1, 9223372036854775807)
+sub(full_lengths, 1)
+unsqueeze(sub, 1)
+take_positions(slice, unsqueeze)
+slice(take_positions, 1, -1, 9223372036854775807)""",
    )


def test_text_of_every_position() -> None:
    assert_expected_inline(
        difference(SPECKV, mask=True, keep=0),
        """\
+unpack_index(pack_order[0])
+take_positions(linear, unpack_index)""",
    )


def test_text_of_a_drafts_own_prompt() -> None:
    state = draft_graphs()["prefill"].before("take_last")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(TakeLast()).gm),
        """\
-slice(slice, 1, -1, 9223372036854775807)
+sub(prompt_lengths, 1)
+unsqueeze(sub, 1)
+take_positions(slice, unsqueeze)
+slice(take_positions, 1, -1, 9223372036854775807)""",
    )


def test_count() -> None:
    check_count(prompt_graph(SPECKV, mask=True, layers=2).after("take_last").gm, take_positions=1, fill=2, slice=10)


@pytest.mark.parametrize("method", [SNAPKV, SPECKV], ids=["SnapKV", "SpecKV"])
def test_numbers_are_those_of_each_row_alone(method: Any) -> None:
    target = tiny(layers=1)
    last = prompt_graph(method, mask=True).after("take_last").run(IDS, HANDLE, MASK)["logits"]
    every = prompt_graph(method, mask=True, keep=0).after("take_last").run(IDS, HANDLE, MASK)["logits"]
    assert (last.shape[1], every.shape[1]) == (1, IDS.shape[1])
    for row, length in enumerate(LENGTHS):
        expected = call(target, IDS[[row], -length:], None, logits_to_keep=0)[0]
        torch.testing.assert_close(every[row, -length:], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last[row], expected[-1:], atol=1e-4, rtol=1e-4)


def test_leaves_full_rows_without_a_lookahead() -> None:
    """The last column is each row's last token already."""
    assert difference(SNAPKV) == ""


def test_leaves_a_model_that_mixes_positions_behind_attention() -> None:
    state = prompt_graph(SPECKV).before("take_last")
    attention = state.facts[Sites].sites[-1].attention
    turned = insert(state, ATEN.flip, attention, [2], before=attention.next)
    attention.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    with pytest.raises(Refusal, match="mixes positions behind the last attention site"):
        state.apply(TakeLast())


def test_alone() -> None:
    state = check_contract(TakeLast(), lambda: prompt_graph(SNAPKV, mask=True).before("take_last"))
    check_count(state.gm, take_positions=1)
    assert not state.facts[Rows].full
