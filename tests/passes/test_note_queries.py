"""note_queries: the newest queries are there when an eviction asks by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, SNAPKV, WIDTH, check_contract, stored
from traces import NEWEST, prompt_graph, step_graph

from specpass.dialect.attention import Attend
from specpass.graph.edit import copy_module
from specpass.passes.note_queries import NoteQueries

HEADS = 4
TOKENS = torch.tensor([[9, 9, 5], [3, 9, 8]])
MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])


def difference(**options: Any) -> str:
    state = step_graph(SNAPKV, **options).before("note_queries")
    before = copy_module(state.gm)
    return changes(before, state.apply(NoteQueries()).gm)


def test_text() -> None:
    assert_expected_inline(
        difference(queries=True),
        """\
-append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, handle, None, None, None, 0, queries_0)
+append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, handle, None, None, None, 0, None)
+note_queries(queries_0, add, 0.25)""",
    )


def test_text_where_tokens_are_masked() -> None:
    assert_expected_inline(
        difference(queries=True, kind="append", mask=True, positions=True),
        """\
-append_kv(key_buffer_0, value_buffer_0, lengths_0, take_rows, take_rows, handle, None, None, None, 0, queries_0)
+append_kv(key_buffer_0, value_buffer_0, lengths_0, take_rows, take_rows, handle, None, None, None, 0, None)
+note_queries(queries_0, take_rows, 0.25, pack_appended[2])""",
    )


def test_count() -> None:
    check_count(step_graph(SNAPKV, queries=True, layers=2).after("note_queries").gm, note_queries=2, attend=2)


@pytest.mark.parametrize("masked", [False, True])
def test_numbers(masked: bool) -> None:
    """What is noted are the queries of attention, times the scale, each row's newest last, and none of padding."""
    state = step_graph(SNAPKV, kind="append", queries=True, mask=masked, positions=True).after("note_queries")
    before = torch.randn(2, HEADS, NEWEST, WIDTH)
    noted, attend = before.clone(), Attend.find(state.gm.graph)[0]
    inputs = (TOKENS, HANDLE, torch.tensor(60), *([MASK] if masked else []), 60 + (MASK.cumsum(1) - 1).clamp(min=0))
    query = state.returning(query=attend.query).run(*inputs, *stored(24, 17), noted)["query"] * attend.scale
    for row, count in enumerate(MASK.sum(1).tolist() if masked else (3, 3)):
        due = torch.cat([before[row, :, count:], query[row, :, :count]], 1)
        torch.testing.assert_close(noted[row], due)


def test_leaves_caches_that_ask_for_none_and_prompts() -> None:
    assert difference() == ""
    state = prompt_graph(SNAPKV).before("note_queries")
    before = copy_module(state.gm)
    assert changes(before, state.apply(NoteQueries()).gm) == ""


def test_alone() -> None:
    check_contract(NoteQueries(), lambda: step_graph(SNAPKV, queries=True).before("note_queries"))
