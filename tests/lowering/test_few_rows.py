"""few_rows: linear layers of a step become calls of a library, those of the same input one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, SNAPKV, State, alone, assert_same, check_contract, small_graph, stored
from torch import Tensor, fx
from traces import prompt_graph, step_graph

import specpass.ops  # noqa: F401  (binds the operators)
from specpass.graph.edit import copy_module
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear import Rows
from specpass.lowering import few_rows
from specpass.lowering.few_rows import FewRows, linear_notes


@pytest.fixture(autouse=True)
def a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no library can be had; the operator itself asks for a real one."""
    monkeypatch.setattr(few_rows, "few_rows", lambda dtype: Rows(lambda *_: None, 32, "a test"))


@pytest.fixture
def any_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are float32: the operator then runs torch's."""
    monkeypatch.setattr(few_rows, "serves", lambda weight, bias: True)


def attention(x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
    query, key = F.linear(x, wq, bq), F.linear(x, wk)
    return F.linear(query * key, wo)


def inputs(dtype: torch.dtype = torch.bfloat16, heads: int = 64) -> tuple[Tensor, ...]:
    sizes = ((1, 1, 32), (heads, 32), (heads,), (heads, 32), (48, heads))
    return tuple(torch.randn(*size, dtype=dtype) for size in sizes)


def traced(function: Callable[..., Any] = attention, **options: Any) -> State:
    return small_graph(function, *inputs(**options), kind="decode")


def lowered(state: State) -> fx.GraphModule:
    alone(FewRows(), state)
    return state.gm


def test_text() -> None:
    gm = lowered(traced())
    assert_expected_inline(
        text(gm),
        """\
linear_rows(x_1, [wq_1, wk_1], [bq_1, None])
linear_rows(mul, [wo_1], [None])""",
    )
    assert linear_notes(gm) == ["3 linear layers in 2 calls: a test, for up to 32 rows"]


@pytest.mark.usefixtures("any_weight")
def test_count() -> None:
    """Four calls a layer, and the head."""
    check_count(step_graph(SNAPKV, layers=2).after("specialize").apply(FewRows()).gm, ["linear"], linear_rows=9)


def test_numbers_of_a_library() -> None:
    """Beside results that spread by 250, of operands that are rounded to bfloat16 on the way."""
    given, state = inputs(), traced()
    exact = attention(*(tensor.double() for tensor in given))
    torch.testing.assert_close(lowered(state)(*given).double(), exact, atol=4.0, rtol=1e-2)


@pytest.mark.usefixtures("any_weight")
def test_numbers_of_a_model_stay() -> None:
    model = step_graph(SNAPKV).after("specialize")
    ours, plain = ([torch.tensor([[5], [9]]), HANDLE, torch.tensor(60), *stored(24, 17)] for _ in range(2))
    before = model.run(*plain)
    assert_same(model.apply(FewRows()).run(*ours), before)


def late(x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
    return F.linear(x, wq, bq) * F.linear(x, wk * 2)


def test_weights_that_come_later_are_a_call_of_their_own() -> None:
    gm = lowered(traced(late))
    check_count(gm, ["linear"], linear_rows=2)
    gm.graph.lint()


def test_leaves_what_no_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, small weights; and everything where there is no library, with a reason."""
    for state in (traced(dtype=torch.float16), traced(heads=8)):
        before = copy_module(state.gm)
        assert changes(before, lowered(state)) == ""
        assert linear_notes(state.gm) == []
    monkeypatch.setattr(few_rows, "few_rows", lambda dtype: Unbuilt("this CPU has no avx2"))
    state = traced()
    before = copy_module(state.gm)
    assert changes(before, lowered(state)) == ""
    assert linear_notes(state.gm) == ["3 linear layers are torch's: this CPU has no avx2"]


def test_leaves_what_autocast_changes() -> None:
    """Weights in float32 whose products are bfloat16: linear_rows would give float32."""
    given = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = small_graph(attention, *given, kind="decode")
    before = copy_module(state.gm)
    assert changes(before, lowered(state)) == ""
    assert linear_notes(state.gm) == []


@pytest.mark.usefixtures("any_weight")
def test_leaves_prompts() -> None:
    state = prompt_graph(SNAPKV).after("specialize")
    before = copy_module(state.gm)
    assert changes(before, state.apply(FewRows()).gm) == ""


@pytest.mark.usefixtures("any_weight")
def test_alone() -> None:
    state = check_contract(FewRows(), lambda: step_graph(SNAPKV).after("specialize"))
    check_count(state.gm, ["linear"], linear_rows=5)
