"""functionalize: in-place operators become those that return what they would have written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import State, alone, check_contract, small_graph
from torch import fx

from specpass.errors import ExportError
from specpass.export.functionalize import Functionalize
from specpass.graph.edit import copy_module

X = torch.arange(6.0).view(2, 3)


def scaled(x: Any) -> Any:
    """What references do: in place, on a tensor of their own."""
    y = x + 1
    y.mul_(2)
    y.view(3, 2).sub_(1.0)
    return y.exp_(), x


def functional(state: State) -> fx.GraphModule:
    alone(Functionalize(), state)
    return state.gm


def simple(x: Any) -> Any:
    y = x + 1
    y.mul_(2).masked_fill_(y > 3, 0.0)
    return y


def test_text() -> None:
    state = small_graph(simple, X)
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, functional(state)),
        """\
-mul_(add, 2)
-gt(mul_, 3)
-masked_fill_(mul_, gt, 0.0)
+mul(add, 2)
+gt(mul, 3)
+masked_fill(mul, gt, 0.0)""",
    )


def test_count() -> None:
    check_count(functional(small_graph(simple, X)), ["mul_", "masked_fill_"], mul=1, masked_fill=1)


def test_numbers_stay() -> None:
    state = small_graph(simple, X)
    expected = state.gm(X.clone())
    given = X.clone()
    assert torch.equal(functional(state)(given), expected)
    assert torch.equal(given, X)


def test_pythons_own_operators() -> None:
    """Masks of sliding layers are made so, and aten calls them otherwise: __ior__."""

    def masked(x: Any) -> Any:
        mask = x > 4
        mask |= x < 1
        return mask

    gm = functional(small_graph(masked, X))
    check_count(gm, ["__ior__"], __or__=1)
    assert torch.equal(gm(X), masked(X))


def test_leaves_what_writes_nothing() -> None:
    state = small_graph(lambda x: (x + 1).exp(), X)
    before = copy_module(state.gm)
    assert changes(before, functional(state)) == ""


def test_leaves_a_tensor_that_is_read_through_another_view() -> None:
    """The other reader would no longer see the change: better an error than another number."""
    state = small_graph(scaled, X)
    with pytest.raises(ExportError, match=re.escape("aten.sub_.Tensor writes a tensor that is read elsewhere")):
        functional(state)


def test_alone() -> None:
    check_count(check_contract(Functionalize(), lambda: small_graph(simple, X)).gm, mul=1)
