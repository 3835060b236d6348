"""take_early: what is not read behind the last attention is not computed, and nobody notices."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, MASK, SNAPKV, SPECKV, SPECPC, State, assert_same, check_contract
from torch import fx
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN, find, value
from specpass.lowering.regions import find_regions, layer_of
from specpass.lowering.take_early import TakeEarly


def ready(method: Any, **options: Any) -> State:
    return prompt_graph(method, **options).after("specialize")


def linears(gm: fx.GraphModule) -> list[int]:
    """How many rows each linear layer of the last decoder layer reads; -1: all."""
    nodes = [node for node in find(gm.graph, ATEN.linear, ATEN.matmul) if value(node).dim() == 3]
    last = max(filter(None, map(layer_of, nodes)))
    counts = [value(node).shape[1] for node in nodes if layer_of(node) == last]
    return [count if isinstance(count, int) else -1 for count in counts]


def test_text() -> None:
    state = ready(SPECKV, verify=True)
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(TakeEarly()).gm),
        """\
-linear(reshape, model_layers_0_self_attn_o_proj_weight)
-add(to, linear)
+sub(full_lengths, 1)
+unsqueeze(sub, 1)
+ahead_index(full_lengths, 4)
+cat([unsqueeze, ahead_index], 1)
+take_positions(reshape, cat)
+linear(take_positions, model_layers_0_self_attn_o_proj_weight)
+take_positions(to, cat)
+add(take_positions, linear)
-sub(full_lengths, 1)
-unsqueeze(sub, 1)
-take_positions(slice, unsqueeze)
-slice(take_positions, 1, -1, 9223372036854775807)
+slice_copy(slice, 1, 0, 1)
+slice(slice_copy, 1, -1, 9223372036854775807)
-ahead_index(full_lengths, 4)
-take_positions(slice, ahead_index)
-linear(take_positions, lm_head_weight)
+slice_copy(slice, 1, 1, 5)
+linear(slice_copy, lm_head_weight)""",
    )


def test_count() -> None:
    state = ready(SPECKV, layers=2, verify=True).apply(TakeEarly())
    check_count(state.gm, take_positions=2, prefill_attention=2, linear=16)


@pytest.mark.parametrize(
    ("method", "options", "rows"),
    [
        (SNAPKV, {}, 1),
        (SNAPKV, {"kind": "short"}, 1),
        (SPECKV, {"verify": True, "mask": True}, 5),
        (SNAPKV, {"family": "gemma2", "layer_types": ("full_attention", "full_attention")}, 1),
        (SNAPKV, {"family": "falcon-alibi"}, 1),  # attention beside the MLP
    ],
    ids=["last", "short", "ahead", "gemma2", "beside"],
)
def test_numbers_stay_and_only_rows_that_are_read_are_computed(method: Any, options: dict[str, Any], rows: int) -> None:
    state = ready(method, layers=2, **options)
    state.results += ["ahead"] if "verify" in options else []
    inputs = (IDS, HANDLE, MASK) if "mask" in options else (IDS[:1], HANDLE)
    expected = dataclasses.replace(state, gm=copy_module(state.gm)).run(*inputs)
    regions = len(find_regions(state.gm))
    found = linears(state.apply(TakeEarly()).gm)
    assert set(found[: found.count(-1)]) == {-1}  # queries, keys and values
    assert set(found[found.count(-1) :]) == {rows}
    assert len(find_regions(state.gm)) == regions - 1
    assert_same(state.run(*inputs), expected)


@pytest.mark.parametrize(("method", "options"), [(SNAPKV, {"keep": 0}), (SPECPC, {})], ids=str)
def test_leaves_what_reads_all_rows_or_so_many(method: Any, options: dict[str, Any]) -> None:
    """Logits of all positions; a prompt of a constant length."""
    state = ready(method, layers=2, **options)
    before = copy_module(state.gm)
    assert changes(before, state.apply(TakeEarly()).gm) == ""


def test_alone() -> None:
    check_contract(TakeEarly(), lambda: ready(SNAPKV))
