"""Operands: calls by the names that their schemas give."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from specpass.dialect import OPERATORS
from specpass.dialect.cache import AppendKv
from specpass.dialect.rows import TakeRows
from specpass.dialect.select import Importance
from specpass.graph.aten import Add, Cat, Largest, Sdpa, Slice, Softmax, Written
from specpass.graph.operands import GetItem, Operands, add_result, items_of, results_of, returned
from specpass.graph.walk import ATEN

SDPA = ATEN.scaled_dot_product_attention.default


class Lab:
    """An empty graph to make calls in."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def tensors(self, *names: str) -> list[fx.Node]:
        return [self.graph.placeholder(name) for name in names]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)


@pytest.fixture
def lab() -> Lab:
    return Lab()


# -- reading


def test_operands_by_name_with_the_schemas_defaults(lab: Lab) -> None:
    query, key, value = lab.tensors("query", "key", "value")
    attention = Sdpa.of(lab.call(SDPA, query, key, value, scale=0.5))
    assert (attention.query, attention.key, attention.value) == (query, key, value)
    assert (attention.attn_mask, attention.dropout_p, attention.is_causal) == (None, 0.0, False)
    assert (attention.scale, attention.enable_gqa) == (0.5, False)
    assert list(attention.operands()) == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip


def test_positional_operands_given_by_keyword(lab: Lab) -> None:
    (x,) = lab.tensors("x")
    cut = Slice.of(lab.call(ATEN.slice.Tensor, x, dim=1, end=4))
    assert (cut.input, cut.dim, cut.start, cut.end, cut.step) == (x, 1, None, 4, 1)


def test_self_is_called_input(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    total = Add.of(lab.call(ATEN.add.Tensor, x, y))
    assert (total.input, total.other) == (x, y)


def test_overloads_of_one_packet(lab: Lab) -> None:
    """What an overload does not have is None: max over everything has no axis."""
    (x,) = lab.tensors("x")
    assert Largest.of(lab.call(ATEN.max.default, x)).dim is None
    assert Largest.of(lab.call(ATEN.max.dim, x, 2)).dim == 2
    assert Largest.of(lab.call(ATEN.amax.default, x, [1])).dim == [1]
    assert Softmax.of(lab.call(ATEN._softmax.default, x, -1, False)).dim == -1
    assert [type(view) for view in Largest.find(lab.graph)] == [Largest] * 3


def test_fake_values_in_the_nodes_place(lab: Lab) -> None:
    query, rows = lab.tensors("query", "rows")
    query.meta["val"], rows.meta["val"] = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2)
    fakes = TakeRows.of(lab.call(TakeRows.packet.default, query, rows)).fakes()
    assert fakes == {"query": query.meta["val"], "rows": rows.meta["val"]}


def test_a_call_of_something_else(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    node = lab.call(ATEN.mul.Tensor, x, y)
    assert Add.match(node) is None
    assert Add.match(3) is None
    assert not Add.is_call(x)
    with pytest.raises(TypeError, match=r"mul_tensor is no call of aten.add"):
        Add.of(node)


def test_a_name_that_the_view_does_not_declare(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    with pytest.raises(AttributeError, match="Add declares no operand 'alpha'"):
        Add.of(lab.call(ATEN.add.Tensor, x, y)).alpha  # noqa: B018


def test_calls_that_write_their_first_operand(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    lab.call(ATEN.add.Tensor, x, y)
    written = lab.call(ATEN.add_.Tensor, x, y)
    assert [view.node for view in Written.find(lab.graph)] == [written]


# -- updating


def test_update_positional(lab: Lab) -> None:
    x, y, z = lab.tensors("x", "y", "z")
    node = lab.call(ATEN.add.Tensor, x, y)
    Add.of(node).update(other=z)
    assert (node.args, dict(node.kwargs)) == ((x, z), {})
    assert list(y.users) == []


def test_update_keyword_only(lab: Lab) -> None:
    query, key, value = lab.tensors("query", "key", "value")
    node = lab.call(SDPA, query, key, value, scale=0.5)
    Sdpa.of(node).update(enable_gqa=True)
    assert (node.args, dict(node.kwargs)) == ((query, key, value), {"scale": 0.5, "enable_gqa": True})


def test_update_fills_in_the_operands_in_front(lab: Lab) -> None:
    query, key, value = lab.tensors("query", "key", "value")
    node = lab.call(SDPA, query, key, value)
    Sdpa.of(node).update(is_causal=True)
    assert node.args == (query, key, value, None, 0.0, True)


def test_update_moves_keywords_that_become_positional(lab: Lab) -> None:
    (x,) = lab.tensors("x")
    node = lab.call(ATEN.slice.Tensor, x, dim=1)
    Slice.of(node).update(end=4)
    assert (node.args, dict(node.kwargs)) == ((x, 1, None, 4), {})


def test_update_of_an_unknown_name(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    with pytest.raises(TypeError, match=r"has no operand \['others'\]"):
        Add.of(lab.call(ATEN.add.Tensor, x, y)).update(others=x)


@pytest.mark.parametrize("name", sorted(OPERATORS))
@given(data=st.data())
def test_what_is_updated_is_read(name: str, data: st.DataObject) -> None:
    """Of every operator, however many operands were given before: the changed ones have changed, no other has."""
    lab, view = Lab(), OPERATORS[name]
    arguments = view.packet.default._schema.arguments
    given_first = data.draw(st.integers(0, len(arguments)))
    nodes = lab.tensors(*(f"given_{argument.name}" for argument in arguments[:given_first]))
    node = lab.call(view.packet.default, *nodes)
    names = [argument.name for argument in arguments]
    changed = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    before = view.of(node).operands()
    changes = dict(zip(changed, lab.tensors(*(f"new_{name}" for name in changed)), strict=True))
    view.of(node).update(**changes)
    assert view.of(node).operands() == before | changes
    assert all(getattr(view.of(node), name) == operand for name, operand in (before | changes).items())


# -- declaring


def test_a_declared_name_that_no_overload_has() -> None:
    with pytest.raises(TypeError, match=r"Wrong: aten.mul has no operand \['factor'\]"):

        class Wrong(Operands, packets=[ATEN.mul]):
            factor: fx.Node


def test_a_name_that_the_views_own_attributes_would_hide() -> None:
    """`find` of a view finds calls; an operand of that name could not be read."""
    library = torch.library.Library("specpass_test_operands", "DEF")
    library.define("hidden(Tensor find) -> Tensor")
    with pytest.raises(TypeError, match=r"Hidden: the operands \['find'\] would be hidden"):

        class Hidden(Operands, packets=[torch.ops.specpass_test_operands.hidden]):
            find: Any


# -- several results


def test_items_and_results(lab: Lab) -> None:
    (x,) = lab.tensors("x")
    pair = lab.call(ATEN.max.dim, x, 0)
    first, second, again = (lab.call(operator.getitem, pair, index) for index in (0, 1, 0))
    assert items_of(pair) == {0: [first, again], 1: [second]}
    item = GetItem.match(second)
    assert item is not None
    assert (item.source, item.index) == (pair, 1)
    assert GetItem.match(pair) is None
    assert GetItem.match(1) is None
    lab.graph.output(first)
    assert returned(lab.graph) is first
    assert results_of(lab.graph) == [first]
    add_result(lab.graph, second)
    assert results_of(lab.graph) == [first, second]
    assert returned(lab.graph) == (first, second)


def test_lists_are_operands(lab: Lab) -> None:
    x, y = lab.tensors("x", "y")
    joined = Cat.of(lab.call(ATEN.cat.default, [x, y], 1))
    assert (list(joined.tensors), joined.dim) == ([x, y], 1)


def test_an_operator_without_results_and_with_written_operands(lab: Lab) -> None:
    keys, values, lengths, key, value = lab.tensors("keys", "values", "lengths", "key", "value")
    append = AppendKv.of(lab.call(AppendKv.packet.default, keys, values, lengths, key, value, None))
    assert (append.keys, append.lengths, append.handle) == (keys, lengths, None)
    assert Importance.match(append.node) is None
