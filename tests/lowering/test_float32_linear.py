"""float32_linear: a prompt's linear layers, where a CPU has no instructions for their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import traces
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, SNAPKV, SPECKV, State, alone, assert_same, check_contract, small_graph
from tiny import tiny
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from traces import prompt_graph, step_graph

import specpass.ops
from specpass.dialect.linear import LinearRows
from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.kernels.cpu import wide
from specpass.lowering.float32_linear import Float32Linear, float32_notes
from specpass.lowering.regions import close, find_regions
from specpass.lowering.row_pieces import split_rows


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "multiplies", lambda dtype: dtype == torch.float32)


@pytest.fixture
def slow_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are float32."""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: False)


def attention(x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, wo: Tensor) -> Tensor:
    query, key = F.linear(x, wq, bq), F.linear(x, wk)
    return F.linear(query * key, wo)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    sizes = ((1, 200, 32), (24, 32), (24,), (24, 32), (48, 24))
    return tuple(torch.randn(*size, dtype=dtype) for size in sizes)


def traced(function: Callable[..., Any] = attention, dtype: torch.dtype = torch.bfloat16) -> State:
    return small_graph(function, *inputs(dtype))


def lowered(state: State) -> fx.GraphModule:
    alone(Float32Linear(), state)
    return state.gm


@pytest.mark.usefixtures("slow_bfloat16")
def test_text() -> None:
    gm = lowered(traced())
    assert_expected_inline(
        text(gm),
        """\
linear_rows(x_1, [wq_1, wk_1], [bq_1, None])
linear_rows(mul, [wo_1], [None])""",
    )
    assert float32_notes(gm) == ["3 linear layers in float32: this CPU has no instructions for bfloat16"]


@pytest.mark.usefixtures("slow_float32")
@pytest.mark.parametrize("method", [SNAPKV, SPECKV])
def test_count(method: Any) -> None:
    """Four calls a layer, and the head."""
    check_count(prompt_graph(method, layers=2).after("specialize").apply(Float32Linear()).gm, ["linear"], linear_rows=9)


@pytest.mark.usefixtures("slow_bfloat16")
def test_numbers_are_float32s_rounded() -> None:
    """And no operator multiplies bfloat16."""
    given, gm, multiplied = inputs(), lowered(traced()), []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (ATEN.mm, ATEN.addmm, ATEN.bmm):
                multiplied.extend(arg.dtype for arg in args if isinstance(arg, Tensor))
            return func(*args, **(kwargs or {}))

    (call, *_) = LinearRows.find(gm.graph)
    assert call.biases[0] is not None
    with Look():
        found = specpass.ops.linear.linear_rows(given[0], [given[1]], [given[2]])[0]
    assert set(multiplied) == {torch.float32}
    exact = F.linear(*(tensor.double() for tensor in given[:3]))
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=2**-8)  # half of a last digit
    whole = attention(*(tensor.double() for tensor in given))
    torch.testing.assert_close(gm(*given).double(), whole, atol=4.0, rtol=1e-2)  # of values that spread by 250


@pytest.mark.usefixtures("slow_float32")
def test_numbers_of_a_model_stay() -> None:
    model = prompt_graph(SNAPKV).after("specialize")
    before = model.run(IDS, HANDLE)
    assert_same(model.apply(Float32Linear()).run(IDS, HANDLE), before)


def experts(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, w, offs=ends)


@pytest.mark.usefixtures("slow_bfloat16")
@pytest.mark.parametrize("turned", [True, False])
def test_numbers_of_experts(turned: bool) -> None:
    """One without rows, one with few, one with many, as both ways of storing weights give them."""
    x, ends = torch.randn(200, 32).bfloat16(), torch.tensor([20, 20, 200], dtype=torch.int32)
    w = torch.randn(3, 24, 32).bfloat16().transpose(1, 2)
    w = w if turned else w.contiguous()
    gm = lowered(small_graph(experts, x, w, ends))
    assert text(gm) == "grouped_linear(x_1, w_1, ends_1)"
    assert float32_notes(gm) == ["1 linear layers in float32: this CPU has no instructions for bfloat16"]
    exact = torch.cat([x[:20].double() @ w[0].double(), x[20:].double() @ w[2].double()])
    torch.testing.assert_close(gm(x, w, ends).double(), exact, atol=1e-4, rtol=2**-8)


def test_experts_of_a_model_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs are grouped products in bfloat16."""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(traces, "tiny", lambda *args, **options: tiny(*args, **options).bfloat16())
    state = prompt_graph.__wrapped__(SNAPKV, family="mixtral").after("specialize").apply(Float32Linear())
    check_count(state.gm, ["linear", "_grouped_mm"], linear_rows=4, grouped_linear=2)


@pytest.mark.usefixtures("slow_float32")
def test_an_mlp_is_read_in_pieces_all_the_same() -> None:
    """See row_pieces.py: its products are known by another name now."""
    state = prompt_graph(SNAPKV, layers=2).after("specialize").apply(Float32Linear())
    splits = [split_rows(close(found.nodes)) for found in find_regions(state.gm)]
    assert [len(LinearRows.find(split.tail.nodes[0].graph)) > 0 for split in splits if split] == [True, True]
    for split in splits:
        assert split is not None
        assert sum(LinearRows.is_call(node) for node in split.tail.nodes) == 3  # of attention, gate and up, down


def test_leaves_what_the_cpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything where it has instructions; float32; steps, which few_rows serves."""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: True)
    state = traced()
    before = copy_module(state.gm)
    assert changes(before, lowered(state)) == ""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: dtype == torch.float32)
    state = traced(dtype=torch.float32)
    before = copy_module(state.gm)
    assert changes(before, lowered(state)) == ""
    assert float32_notes(state.gm) == []
    monkeypatch.setattr(wide, "multiplies", lambda dtype: False)
    check_count(step_graph(SNAPKV).after("specialize").apply(Float32Linear()).gm, ["linear_rows"])


@pytest.mark.usefixtures("slow_bfloat16")
def test_leaves_what_autocast_changes() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        state = small_graph(attention, *inputs(torch.float32))
    before = copy_module(state.gm)
    assert changes(before, lowered(state)) == ""


@pytest.mark.usefixtures("slow_float32")
def test_alone() -> None:
    check_contract(Float32Linear(), lambda: prompt_graph(SNAPKV).after("specialize"))
