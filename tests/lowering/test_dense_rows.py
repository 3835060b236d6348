"""dense_rows: no linear layer reads rows that PyTorch would take one product each for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import SNAPKV, SPECKV, SPECPC, check_contract
from torch import fx
from traces import prompt_graph

from specpass.graph.walk import ATEN, find, value
from specpass.lowering.dense_rows import DenseRows, is_one_matrix
from specpass.lowering.take_early import TakeEarly


def apart(gm: fx.GraphModule) -> int:
    """Linear layers whose rows are no one matrix."""
    return sum(not is_one_matrix(value(node.args[0])) for node in find(gm.graph, ATEN.linear))


@pytest.mark.parametrize(("method", "verify"), [(SPECKV, True), (SNAPKV, False), (SPECPC, False)])
def test_all_rows_lie_together(method: Any, verify: bool) -> None:
    state = prompt_graph(method, verify=verify).after("specialize").apply(TakeEarly())
    before = apart(state.gm)
    assert before > 0 or method is SPECPC
    assert apart(state.apply(DenseRows()).gm) == 0
    assert len(find(state.gm.graph, ATEN.clone)) >= before


def test_is_atens_question() -> None:
    """What is no matrix is what at::matmul expands the weight for: its flops are counted as a batched product's."""
    from torch.utils._python_dispatch import TorchDispatchMode

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


def test_contract() -> None:
    check_contract(DenseRows(), lambda: prompt_graph(SNAPKV).after("specialize"))
