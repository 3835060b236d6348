"""dense_rows: no linear layer reads rows that PyTorch would take one product each for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes
from graphs import HANDLE, IDS, SNAPKV, SPECKV, SPECPC, State, assert_same, check_contract
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN, find, value
from specpass.lowering.dense_rows import DenseRows, is_one_matrix
from specpass.lowering.take_early import TakeEarly


def ready(method: Any, **options: Any) -> State:
    return prompt_graph(method, **options).after("specialize").apply(TakeEarly())


def apart(gm: fx.GraphModule) -> int:
    """Linear layers whose rows are no one matrix."""
    return sum(not is_one_matrix(value(node.all_input_nodes[0])) for node in find(gm.graph, ATEN.linear))


def test_text() -> None:
    state = ready(SNAPKV)
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(DenseRows()).gm),
        """\
-linear(slice, model_layers_0_self_attn_o_proj_weight)
+clone(slice, memory_format=torch.contiguous_format)
+linear(clone, model_layers_0_self_attn_o_proj_weight)
-linear(slice, lm_head_weight)
+clone(slice, memory_format=torch.contiguous_format)
+linear(clone, lm_head_weight)""",
    )


@pytest.mark.parametrize(("method", "verify"), [(SPECKV, True), (SNAPKV, False)])
def test_count_in_calls_is_none(method: Any, verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real tensors, whose strides may be others than a fake value says."""
    state = ready(method, verify=verify, layers=2).apply(DenseRows())
    assert apart(state.gm) == 0
    state.results += ["ahead"] * verify
    counted = []

    class Look(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is ATEN.linear.default:
                counted.append(is_one_matrix(args[0]))
            return super().call_function(target, args, kwargs)

    monkeypatch.setattr(fx, "Interpreter", Look)
    state.run(IDS[:1], HANDLE)
    assert counted.count(True) == len(counted) > 14


def test_numbers_stay() -> None:
    state = ready(SNAPKV, layers=2)
    expected = dataclasses.replace(state, gm=copy_module(state.gm)).run(IDS[:1], HANDLE)
    assert_same(state.apply(DenseRows()).run(IDS[:1], HANDLE), expected)


def test_leaves_rows_that_lie_together() -> None:
    state = ready(SPECPC)
    before = copy_module(state.gm)
    assert changes(before, state.apply(DenseRows()).gm) == ""


def test_alone() -> None:
    check_contract(DenseRows(), lambda: prompt_graph(SNAPKV).after("specialize"))


def test_is_atens_question() -> None:
    """What is no one matrix is what ATen takes a batched product for."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    whole, weight = torch.randn(2, 9, 8), torch.randn(5, 8)
    for rows in (whole, whole[:, :1], whole[:1, 2:5], whole[:, -1:], whole[:1], whole[0], whole.transpose(0, 1)):
        names: list[Any] = []
        with Seen():
            torch.nn.functional.linear(rows, weight)
        assert (ATEN.bmm in names) is (rows.dim() == 3 and not is_one_matrix(rows)), rows.shape
