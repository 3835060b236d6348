"""pack_rows: padding becomes one length per row, and a row computes what it computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SNAPKV, assert_same, by_head, check_contract, insert
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.facts import Inputs, Rows
from specpass.passes.pack_rows import PackRows
from specpass.rewrite import Refusal


def difference(**options: Any) -> str:
    state = prompt_graph(SNAPKV, **options).before("pack_rows")
    before = copy_module(state.gm)
    return changes(before, state.apply(PackRows()).gm)


def test_text_of_a_padded_batch() -> None:
    assert_expected_inline(
        difference(mask=True, positions=True),
        """\
-embedding(model_embed_tokens_weight, input_ids, 0)
-sym_size(input_ids, 1)
-sym_size(input_ids, 0)
-unsqueeze(position_ids, 2)
+pack_order(attention_mask, input_ids)
+pack_ids(input_ids, pack_order[0])
+expand_rows(position_ids, pack_order[0])
+pack_ids(expand_rows, pack_order[0])
+embedding(model_embed_tokens_weight, pack_ids, 0)
+sym_size(pack_ids, 1)
+sym_size(pack_ids, 0)
+unsqueeze(pack_ids, 2)
-size(add, 2)
+size(pack_ids, 1)""",
    )


def test_count() -> None:
    state = prompt_graph(SNAPKV, mask=True, layers=2).after("pack_rows")
    check_count(state.gm, ["full_lengths", "expand_rows"], pack_order=1, pack_ids=1, prefill_attention=2)
    state = prompt_graph(SNAPKV, mask=True, positions=True).after("pack_rows")
    check_count(state.gm, ["full_lengths"], pack_order=1, expand_rows=1, pack_ids=2)


@pytest.mark.parametrize("positions", [False, True])
def test_numbers_of_a_row_are_those_of_the_row_alone(positions: bool) -> None:
    state = prompt_graph(SNAPKV, mask=True, positions=positions).before("pack_rows")
    told = [(MASK.cumsum(1) - 1).clamp(min=0)] if positions else []
    single = [(IDS[[row], -length:], MASK[[row], -length:]) for row, length in enumerate(LENGTHS)]
    expected = [state.run(ids, HANDLE, mask, *(torch.arange(ids.shape[1])[None] for _ in told)) for ids, mask in single]
    state.apply(PackRows()).returning(used=state.facts[Rows].lengths)
    found = state.run(IDS, HANDLE, MASK, *told)
    assert found["used"].tolist() == list(LENGTHS)
    assert int(found["seen"]) == IDS.shape[1]  # the cache counts the caller's columns
    for row, length in enumerate(LENGTHS):
        for part in ("key_buffer.0", "value_buffer.0"):
            ours, alone = by_head(found[part])[row, :, :length], by_head(expected[row][part])[0, :, :length]
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_leaves_a_prompt_without_padding() -> None:
    """The ids stay where they are; only their number is said."""
    assert_expected_inline(
        difference(),
        """\
+full_lengths(input_ids)
-size(add, 2)
+size(input_ids, 1)""",
    )
    state = prompt_graph(SNAPKV).before("pack_rows")
    before = state.run(IDS, HANDLE)
    assert_same(state.apply(PackRows()).run(IDS, HANDLE), before, tolerance=0.0)
    assert state.facts[Rows].full
    assert state.facts[Rows].order is None


def test_leaves_a_model_that_reads_the_mask_outside_attention() -> None:
    state = prompt_graph(SNAPKV, mask=True).before("pack_rows")
    mask = state.facts[Inputs].mask
    read = insert(state, ATEN.cumsum, mask, 1, before=state.facts[Inputs].tokens.next.next.next)
    state.returning(read=read)
    with pytest.raises(Refusal, match=r"attention_mask is read outside attention \(by aten.cumsum.default\)"):
        state.apply(PackRows())


def test_alone() -> None:
    state = check_contract(PackRows(), lambda: prompt_graph(SNAPKV, mask=True).before("pack_rows"))
    assert state.facts[Inputs].tokens.target.name() == "specpass::pack_ids"
