"""share_lse: importance gets attention's log-sum-exp where it is that of the same queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, SNAPKV, State, alone, assert_same, check_contract, small_graph
from torch import fx
from traces import prompt_graph, step_graph

import specpass.ops  # noqa: F401  (binds the operators)
from specpass.dialect.attention import PrefillAttentionLse
from specpass.dialect.define import SPEC
from specpass.graph.edit import copy_module
from specpass.kernels import dispatch
from specpass.kernels.archs import ARCHS
from specpass.lowering import share_lse
from specpass.lowering.choose import choose_sites
from specpass.lowering.share_lse import ShareLse

pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
B, H, K, T, R, W, D = 2, 8, 2, 60, 12, 4, 64


def scored(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    query, key, value = (torch.randn(B, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K, K))
    rows = torch.full((B, R), 1).cumsum(1) + (T - R - 1)
    return query, key, value, rows, torch.full((B,), T - R + W)


def traced(function: Callable[..., Any] = scored, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> State:
    return small_graph(function, *inputs(dtype), device=device)


def fused(state: State) -> fx.GraphModule:
    alone(ShareLse(), state)
    return state.gm


def test_text() -> None:
    assert_expected_inline(
        text(fused(traced())),
        """\
prefill_attention_lse(query_1, key_1, value_1, rows_1, 0.1)
take_rows(query_1, rows_1)
importance(take_rows, key_1, rows_1, lengths_1, 4, 0.1, max, None, prefill_attention_lse[1])""",
    )
    assert [str(choice) for _, choice in choose_sites(fused(traced()))] == [
        "prefill_attention_lse: aten (torch's flash attention, whose log-sum-exp saves importance its first pass over "
        "K)",
        "importance: kernel importance_given_lse (shapes are supported)",
    ]


def test_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_lse, "shares_lse", lambda *tensors: True)
    state = prompt_graph(SNAPKV, layers=2).after("specialize").apply(ShareLse())
    check_count(state.gm, ["prefill_attention"], prefill_attention_lse=2, importance=2, take_rows=2)


def test_shapes_of_the_results() -> None:
    attention = PrefillAttentionLse.find(fused(traced()).graph)[0].node
    out, lse = attention.meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((B, H, T, D), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((B, H, R), torch.float32, "cuda")


def test_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_lse, "shares_lse", lambda *tensors: True)
    state, given = traced(device="cpu", dtype=torch.float32), inputs(torch.float32)
    expected = state.gm(*given)
    gm = fused(state)
    check_count(gm, ["prefill_attention"], prefill_attention_lse=1)
    torch.testing.assert_close(gm(*given), expected, atol=1e-6, rtol=1e-5)
    model = prompt_graph(SNAPKV).after("specialize")
    before = model.run(IDS, HANDLE)
    assert_same(model.apply(ShareLse()).run(IDS, HANDLE), before)


def other_key(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key + 1, rows, lengths, W, 0.1, "max")


def other_scale(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.2)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def late_rows(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    rows = rows + 0
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def capped(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1, 50.0)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max", None, None, 50.0)


def known_lse(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    """As where several futures score."""
    out, (_, lse) = (
        SPEC.prefill_attention(query, key, value, 0.1),
        SPEC.prefill_attention_lse(query, key, value, rows, 0.1),
    )
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max", None, lse)


def wide_values(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    return scored(query, key, torch.cat([value, value], -1), rows, lengths)


@pytest.mark.parametrize("function", [other_key, other_scale, late_rows, capped, known_lse, wide_values])
def test_leaves_importance_of_something_else(function: Callable[..., Any]) -> None:
    state = traced(function)
    before = copy_module(state.gm)
    assert changes(before, fused(state)) == ""


def test_leaves_attention_that_aten_does_not_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    check_count(fused(traced(dtype=torch.float32)), ["prefill_attention_lse"], prefill_attention=1)
    old = dataclasses.replace(ARCHS["sm_80"], name="sm_75", capability=75)
    for arch, flash in ((old, False), (ARCHS["gfx942"], False), (ARCHS["sm_90"], False), (ARCHS["sm_80"], True)):
        monkeypatch.setattr(dispatch, "device_arch", lambda index, arch=arch: arch)
        assert bool(PrefillAttentionLse.find(fused(traced()).graph)) == flash


def test_leaves_steps() -> None:
    state = step_graph(SNAPKV).after("specialize")
    before = copy_module(state.gm)
    assert changes(before, state.apply(ShareLse()).gm) == ""


def test_alone() -> None:
    check_contract(ShareLse(), lambda: prompt_graph(SNAPKV).after("specialize"))
