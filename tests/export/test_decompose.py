"""decompose: what a table names is written out in its place, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import small_graph
from torch import fx
from torch._decomp import get_decompositions

from specpass.export.decompose import FlatProgram, Table, decompose
from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN

X = torch.arange(6.0).view(2, 3)
TABLE = get_decompositions([ATEN.silu, ATEN.split.Tensor])


def gated(x: Any) -> Any:
    """A list's items among what is decomposed, and a result that is."""
    first, second = torch.split(x, 1)
    return (torch.nn.functional.silu(first + second),)


def traced() -> fx.GraphModule:
    return small_graph(gated, X).gm


def test_text() -> None:
    gm = traced()
    before = copy_module(gm)
    assert decompose(gm, TABLE)
    assert_expected_inline(
        changes(before, gm),
        """\
-split(x_1, 1)
-add(split[0], split[1])
-silu(add)
+split_with_sizes(x_1, [1, 1])
+add(split_with_sizes[0], split_with_sizes[1])
+sigmoid(add)
+mul(add, sigmoid)""",
    )


def test_count_and_numbers() -> None:
    gm = traced()
    expected = gm(X)
    assert decompose(gm, TABLE)
    check_count(gm, ["silu", "split"], sigmoid=1, add=1)
    torch.testing.assert_close(gm(X)[0], expected[0])


def test_an_operator_that_may_return_its_operand_is_written_out_where_onnx_has_none() -> None:
    gm = small_graph(lambda x: (x.to(torch.float64),), X).gm
    assert decompose(gm, {})
    check_count(gm, ["to"], _to_copy=1)


def test_leaves_what_the_table_does_not_name() -> None:
    gm = traced()
    before = copy_module(gm)
    assert decompose(gm, get_decompositions([ATEN.gelu]))
    assert changes(before, gm) == ""


def test_a_decomposition_with_a_tensor_of_its_own_is_left_to_torch() -> None:
    gm = traced()
    table: Table = {ATEN.silu.default: lambda x: x * torch.tensor([2.0, 3.0, 4.0])}
    assert not decompose(gm, table)
    check_count(gm, silu=1)


def test_torch_finds_a_program_that_is_decomposed() -> None:
    """With the output's new name, and by torch's own way where ours leaves something."""
    program = FlatProgram.of(traced())
    check_count(program.run_decompositions(TABLE).graph_module, ["silu"], sigmoid=1)
