"""attend_slots: a step attends to the slots that lengths say are in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import check_count, text
from graphs import HANDLE, SNAPKV, assert_same, check_contract, insert, stored
from traces import prompt_graph, step_graph

import specpass
from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.attend_slots import AttendSlots
from specpass.rewrite.sites import Sites

SDPA = "scaled_dot_product_attention"
TOKENS = torch.tensor([[5, 7, 11], [9, 3, 8]])
PYRAMID = specpass.PyramidKV(budget=24, window=8)


def test_text() -> None:
    state = step_graph(SNAPKV).before("attend_slots")
    before = text(state.gm, SDPA)
    assert_expected_inline(
        f"{before}\n->\n{text(state.apply(AttendSlots()).gm)}",
        """\
scaled_dot_product_attention(add, view, view, expand, scale=0.25, enable_gqa=True)
->
append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, handle)
advance(seen, None, 1)
attend(add, view, view, lengths_0, 0.25)""",
    )


def test_text_of_unlike_budgets() -> None:
    """The model was shown every layer as wide as the widest; each attends to its own slots."""
    state = step_graph(PYRAMID, layers=2).before("attend_slots")
    before = text(state.gm, SDPA, "widen")
    assert_expected_inline(
        f"{before}\n->\n{text(state.apply(AttendSlots()).gm, 'unflatten', 'attend')}",
        """\
widen(key_buffer_0, 2, floordiv)
widen(value_buffer_0, 2, floordiv)
scaled_dot_product_attention(add, widen, widen, expand, scale=0.25, enable_gqa=True)
widen(key_buffer_1, 2, floordiv)
widen(value_buffer_1, 2, floordiv)
scaled_dot_product_attention(add, widen, widen, expand, scale=0.25, enable_gqa=True)
->
unflatten(key_buffer_0, 1, [2, -1])
unflatten(value_buffer_0, 1, [2, -1])
attend(add, unflatten, unflatten, lengths_0, 0.25)
unflatten(key_buffer_1, 1, [2, -1])
unflatten(value_buffer_1, 1, [2, -1])
attend(add, unflatten, unflatten, lengths_1, 0.25)""",
    )


def test_text_of_shared_budgets() -> None:
    state = step_graph(specpass.SnapKV(budget=24, window=8, spread="heads")).before("attend_slots")
    before = text(state.gm, "show_heads", SDPA)
    assert_expected_inline(
        f"{before}\n->\n{text(state.apply(AttendSlots()).gm, 'show_heads', 'attend')}",
        """\
show_heads(key_buffer_0, starts_0, floordiv)
show_heads(value_buffer_0, starts_0, floordiv)
scaled_dot_product_attention(add, show_heads, show_heads, expand, scale=0.25, enable_gqa=True)
->
attend(add, key_buffer_0, value_buffer_0, lengths_0, 0.25, 0.0, None, 0, 0, None, starts_0, 1)""",
    )


@pytest.mark.parametrize("kind", ["decode", "append"])
def test_count(kind: Any) -> None:
    state = step_graph(SNAPKV, kind=kind, layers=2).after("attend_slots")
    check_count(state.gm, [SDPA, "le", "bitwise_and", "__and__"], attend=2, append_kv=2)


@pytest.mark.parametrize(("kind", "count"), [("decode", 1), ("append", 3)])
def test_numbers_stay(kind: Any, count: int) -> None:
    """The masks that the model made of the cache's length said the same."""
    tokens = TOKENS[:, :count]

    def inputs() -> list[torch.Tensor]:
        return [tokens, HANDLE, torch.tensor(60), *stored(24, 24)]

    state = step_graph(SNAPKV, kind=kind).before("attend_slots")
    mine, theirs = inputs(), inputs()
    before = state.run(*theirs)
    assert_same(state.apply(AttendSlots()).run(*mine), before)
    for ours, other in zip(mine, theirs, strict=True):  # what is written in place
        assert torch.equal(ours, other)


def test_numbers_of_a_row_are_those_of_the_row_alone() -> None:
    """Rows of unlike lengths: no row sees slots that only another one uses."""
    state = step_graph(SNAPKV, positions=True).after("attend_slots")
    position = torch.tensor([[60], [43]])
    both = state.run(TOKENS[:, :1], HANDLE, torch.tensor(60), position, *stored(24, 17))["logits"]
    for row, used in enumerate((24, 17)):
        own = [part[[row]] for part in stored(24, 17)]
        assert int(own[2][0, 0]) == used
        alone = state.run(TOKENS[[row], :1], HANDLE, torch.tensor(60), position[[row]], *own)["logits"]
        torch.testing.assert_close(both[[row]], alone)


def test_leaves_attention_that_is_no_site() -> None:
    state = step_graph(SNAPKV).before("attend_slots")
    site = state.facts[Sites].sites[0]
    other = insert(state, ATEN.scaled_dot_product_attention, site.query, site.query, site.query, before=site.attention)
    state.returning(other=other).apply(AttendSlots())
    assert_expected_inline(
        text(state.gm, SDPA, "attend"),
        """\
scaled_dot_product_attention(add, add, add)
attend(add, view, view, lengths_0, 0.25)""",
    )


def test_leaves_prompts() -> None:
    state = prompt_graph(SNAPKV).before("attend_slots")
    before = text(copy_module(state.gm))
    assert text(state.apply(AttendSlots()).gm) == before


def test_alone() -> None:
    state = check_contract(AttendSlots(), lambda: step_graph(SNAPKV).before("attend_slots"))
    assert [site.attention.target.name() for site in state.facts[Sites].sites] == ["specpass::attend"]
