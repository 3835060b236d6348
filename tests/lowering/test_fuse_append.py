"""fuse_append: attention writes the token that it attends to, where nothing reads the storage in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, SNAPKV, State, alone, assert_same, check_contract, small_graph, stored
from torch import fx
from traces import prompt_graph, step_graph

import specpass.ops  # noqa: F401  (binds the operators)
from specpass.dialect.attention import AppendAttend
from specpass.dialect.define import SPEC
from specpass.graph.edit import copy_module
from specpass.kernels.dispatch import Choice
from specpass.lowering import fuse_append
from specpass.lowering.choose import choose_sites
from specpass.lowering.fuse_append import FuseAppend

pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
B, H, K, P, D = 2, 8, 2, 84, 64


@pytest.fixture
def a_kernel_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says kernel for CPU tensors; the operator itself still runs its reference there."""
    monkeypatch.setattr(fuse_append, "choose", lambda operator, operands: Choice(operator, "decode_append", "a test"))


def step(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    return SPEC.attend(query, *(states.unflatten(1, (K, -1)) for states in (keys, values)), used, 0.1)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    storage = tuple(torch.randn(B, K * P, D, dtype=dtype) for _ in range(2))
    return *storage, torch.full((B, K), 20), *(torch.randn(B, heads, 1, D, dtype=dtype) for heads in (H, K, K))


def traced(function: Callable[..., Any] = step, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> State:
    return small_graph(function, *inputs(dtype), kind="decode", device=device)


def fused(state: State) -> fx.GraphModule:
    alone(FuseAppend(), state)
    return state.gm


def test_text() -> None:
    gm = fused(traced())
    assert_expected_inline(
        text(gm), """append_attend(keys_1, values_1, used_1, query_1, key_1, value_1, 0.1, 0.0, None, 0, 0)"""
    )
    assert [str(choice) for _, choice in choose_sites(gm)] == [
        "append_attend: kernel decode_append (shapes are supported)"
    ]
    out = AppendAttend.find(gm.graph)[0].node.meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((B, H, 1, D), torch.bfloat16, "cuda")


@pytest.mark.usefixtures("a_kernel_for_the_cpu")
def test_count() -> None:
    state = step_graph(SNAPKV, layers=2).after("specialize").apply(FuseAppend())
    check_count(state.gm, ["append_kv", "attend"], append_attend=2, advance=1)


@pytest.mark.usefixtures("a_kernel_for_the_cpu")
def test_numbers_stay() -> None:
    state, given = traced(device="cpu", dtype=torch.float32), inputs(torch.float32)
    mine, theirs = (tuple(tensor.clone() for tensor in given) for _ in range(2))
    expected = state.gm(*theirs)
    torch.testing.assert_close(fused(state)(*mine), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):  # what is written in place
        assert torch.equal(one, other)
    model = step_graph(SNAPKV).after("specialize")
    ours, plain = ([torch.tensor([[5], [9]]), HANDLE, torch.tensor(60), *stored(24, 17)] for _ in range(2))
    before = model.run(*plain)
    assert_same(model.apply(FuseAppend()).run(*ours), before)
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def read_between(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    seen = keys.view(B, K, P, D).sum(2)
    slots = (states.unflatten(1, (K, -1)) for states in (keys, values))
    return seen, SPEC.attend(query, *slots, used, 0.1)


def other_storage(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    return SPEC.attend(query, *(states.unflatten(1, (K, -1)) for states in (values, keys)), used, 0.1)


def written_behind(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    out = SPEC.attend(query, *(states.unflatten(1, (K, -1)) for states in (keys, values)), used, 0.1)
    SPEC.append_kv(keys, values, used, key, value, None)
    return out


def several(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[State, tuple[Any, ...]]:
    """A block of three tokens, and its operands."""
    new = [torch.randn(B, heads, 3, D, dtype=dtype) for heads in (H, K, K)]
    given = (*inputs(dtype)[:3], *new)
    return small_graph(step, *given, kind="append", device=device), given


@pytest.mark.usefixtures("a_kernel_for_the_cpu")
def test_leaves_several_tokens_on_a_gpu() -> None:
    """Kernels write one there."""
    state, _ = several("cuda")
    before = copy_module(state.gm)
    assert changes(before, fused(state)) == ""


@pytest.mark.usefixtures("a_kernel_for_the_cpu")
def test_numbers_of_several_tokens_on_a_cpu() -> None:
    state, given = several("cpu", torch.float32)
    mine, theirs = (tuple(tensor.clone() for tensor in given) for _ in range(2))
    expected = state.gm(*theirs)
    torch.testing.assert_close(fused(state)(*mine), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    model = step_graph(SNAPKV, kind="append").after("specialize").apply(FuseAppend())
    check_count(model.gm, ["append_kv", "attend"], append_attend=1)


@pytest.mark.parametrize("function", [read_between, other_storage, written_behind])
def test_leaves_an_append_that_others_read(function: Callable[..., Any]) -> None:
    state = traced(function)
    before = copy_module(state.gm)
    assert changes(before, fused(state)) == ""


def test_leaves_what_the_table_gives_to_aten() -> None:
    gm = fused(traced(device="cpu", dtype=torch.float16))
    check_count(gm, ["append_attend"], append_kv=1, attend=1)


def test_leaves_prompts() -> None:
    state = prompt_graph(SNAPKV).after("specialize")
    before = copy_module(state.gm)
    assert changes(before, state.apply(FuseAppend()).gm) == ""


def test_alone() -> None:
    check_contract(FuseAppend(), lambda: step_graph(SNAPKV).after("specialize"))
