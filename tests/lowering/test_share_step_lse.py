"""share_step_lse: in a draft's step, importance gets attention's log-sum-exp where it is that of the same row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import SPECPC, State, alone, assert_same, check_contract, small_graph, stored
from torch import fx
from traces import draft_graphs

import specpass.ops  # noqa: F401  (binds the operators)
from specpass.dialect.define import SPEC
from specpass.graph.edit import copy_module
from specpass.kernels.dispatch import Choice
from specpass.lowering import fuse_append, share_step_lse
from specpass.lowering.choose import choose_sites
from specpass.lowering.fuse import FUSION
from specpass.lowering.fuse_append import FuseAppend
from specpass.lowering.share_step_lse import ShareStepLse
from specpass.rewrite import Request

pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
B, H, K, P, D, USED = 2, 8, 2, 84, 64, 20
DRAFT = Request("decode", model="draft")


@pytest.fixture
def kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says kernel for CPU tensors; the operators themselves still run their references there."""
    for module in (fuse_append, share_step_lse):
        monkeypatch.setattr(module, "choose", lambda operator, operands: Choice(operator, operator, "a test"))


def step(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.append_attend(keys, values, used, query, key, value, 0.1)
    return out, SPEC.importance(query, keys.unflatten(1, (K, -1)), rows, lengths, 0, 0.1, "max")


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    storage = tuple(torch.randn(B, K * P, D, dtype=dtype) for _ in range(2))
    new = (torch.randn(B, heads, 1, D, dtype=dtype) for heads in (H, K, K))
    return *storage, torch.full((B, K), USED), *new, torch.full((B, 1), USED), torch.full((B,), USED - 2)


def traced(function: Callable[..., Any] = step, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> State:
    state = small_graph(function, *inputs(dtype), kind="decode", device=device)
    state.request = DRAFT
    return state


def fused(state: State) -> fx.GraphModule:
    alone(ShareStepLse(), state)
    return state.gm


def test_text() -> None:
    gm = fused(traced())
    assert_expected_inline(
        text(gm),
        """\
append_attend_lse(keys_1, values_1, used_1, query_1, key_1, value_1, 0.1)
importance(query_1, unflatten, rows_1, lengths_1, 0, 0.1, max, None, append_attend_lse[1])""",
    )
    assert [str(choice) for _, choice in choose_sites(gm)] == [
        "append_attend_lse: kernel decode_append_lse (shapes are supported)",
        "importance: kernel importance_given_lse (shapes are supported)",
    ]


@pytest.mark.usefixtures("kernels_for_the_cpu")
def test_count() -> None:
    """All three layers attend, and the second and third score."""
    state = draft_graphs(SPECPC, 3)["decode"].after("score_draft_step").apply(*FUSION)
    check_count(state.gm, ["append_kv", "attend"], append_attend=1, append_attend_lse=2, importance=2)


@pytest.mark.usefixtures("kernels_for_the_cpu")
def test_numbers_stay() -> None:
    state, given = traced(device="cpu", dtype=torch.float32), inputs(torch.float32)
    mine, theirs = (tuple(tensor.clone() for tensor in given) for _ in range(2))
    expected = state.gm(*theirs)
    torch.testing.assert_close(fused(state)(*mine), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):  # what is written in place
        assert torch.equal(one, other)


@pytest.mark.usefixtures("kernels_for_the_cpu")
def test_numbers_of_a_draft_stay() -> None:
    """Of a sequence that goes on and of one that has ended, whose row is -1."""
    model = draft_graphs(SPECPC)["decode"].after("score_draft_step")
    model.results.append("scores")
    position, rows = torch.tensor([[24], [17]]), torch.tensor([[24], [-1]])
    ours, plain = ([torch.tensor([[5], [9]]), position, rows, torch.tensor([22, 17]), *stored(24, 17)] for _ in "ab")
    before = model.run(*plain)
    after = model.apply(*FUSION)
    check_count(after.gm, append_attend_lse=1)
    assert_same(after.run(*ours), before)
    assert before["scores"].any()


def other_query(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.append_attend(keys, values, used, query, key, value, 0.1)
    return out, SPEC.importance(query + 1, keys.unflatten(1, (K, -1)), rows, lengths, 0, 0.1, "max")


def other_scale(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.append_attend(keys, values, used, query, key, value, 0.2)
    return out, SPEC.importance(query, keys.unflatten(1, (K, -1)), rows, lengths, 0, 0.1, "max")


def capped(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.append_attend(keys, values, used, query, key, value, 0.1, 50.0)
    stored = keys.unflatten(1, (K, -1))
    return out, SPEC.importance(query, stored, rows, lengths, 0, 0.1, "max", None, None, 50.0)


def in_front(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    scores = SPEC.importance(query, keys.unflatten(1, (K, -1)), rows, lengths, 0, 0.1, "max")
    return scores, SPEC.append_attend(keys, values, used, query, key, value, 0.1)


@pytest.mark.parametrize("function", [other_query, other_scale, capped, in_front])
def test_leaves_importance_of_something_else(function: Callable[..., Any]) -> None:
    state = traced(function)
    before = copy_module(state.gm)
    assert changes(before, fused(state)) == ""


def test_leaves_targets_and_what_has_no_kernel() -> None:
    """Only a draft's step is known to score the token that it appends."""
    state = traced()
    state.request = Request("decode")
    check_count(state.apply(ShareStepLse()).gm, ["append_attend_lse"], append_attend=1)
    check_count(fused(traced(device="cpu", dtype=torch.float16)), ["append_attend_lse"], append_attend=1)


@pytest.mark.usefixtures("kernels_for_the_cpu")
def test_alone() -> None:
    state = check_contract(
        ShareStepLse(), lambda: draft_graphs(SPECPC)["decode"].after("score_draft_step").apply(FuseAppend())
    )
    check_count(state.gm, append_attend_lse=1)
