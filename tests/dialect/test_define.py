"""How operators are declared, and that each declaration is complete: an implementation, stages, fake results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

import specpass.dialect
from specpass.dialect import OPERATORS
from specpass.dialect.define import ORDER, Operator
from specpass.ops import IMPLEMENTATIONS

NAMES = sorted(OPERATORS)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Operators that a test declares are no operators of specpass afterwards."""
    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)


@pytest.mark.usefixtures("forgotten")
def test_a_declaration() -> None:
    class Doubled(Operator, schema="test_doubled(Tensor x, float factor=2.0) -> Tensor", since="PRUNED"):
        """Twice x."""

        x: fx.Node
        factor: float

        @staticmethod
        def fake(x: Any, factor: float = 2.0) -> Any:
            return torch.empty_like(x)

    assert OPERATORS["test_doubled"] is Doubled
    assert (Doubled.name, Doubled.since, Doubled.until) == ("test_doubled", "PRUNED", "LOWERED")
    assert torch.ops.specpass.test_doubled(torch.zeros(3, device="meta")).shape == (3,)
    graph = fx.Graph()
    node = graph.call_function(Doubled.packet.default, (graph.placeholder("x"),))
    assert Doubled.of(node).factor == 2.0


@pytest.mark.usefixtures("forgotten")
def test_an_operand_of_the_schema_that_is_not_annotated() -> None:
    with pytest.raises(TypeError, match=r"Less: the schema's operands \['y'\] are not declared"):

        class Less(Operator, schema="test_less(Tensor x, Tensor y) -> Tensor"):
            x: fx.Node


@pytest.mark.usefixtures("forgotten")
def test_an_annotation_that_the_schema_has_not() -> None:
    with pytest.raises(TypeError, match=re.escape("More: specpass.test_more has no operand ['y']")):

        class More(Operator, schema="test_more(Tensor x) -> Tensor"):
            x: fx.Node
            y: fx.Node


def test_a_name_that_is_declared_already() -> None:
    with pytest.raises(TypeError, match="Again: the operator select is declared twice"):

        class Again(Operator, schema="select(Tensor x) -> Tensor"):
            x: fx.Node


# -- all operators


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_known_and_in_order(name: str) -> None:
    operator = OPERATORS[name]
    assert ORDER.index(operator.since) <= ORDER.index(operator.until)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_says_what_it_is(name: str) -> None:
    operator = OPERATORS[name]
    assert operator.__doc__
    assert operator.__module__.startswith("specpass.dialect.")
    assert getattr(specpass.dialect, operator.__module__.rsplit(".", 1)[1])


def parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_implementation_takes_the_schemas_operands(name: str) -> None:
    """By the schema's names and with its defaults; a fake may fold the operands that it does not read."""
    arguments = OPERATORS[name].packet.default._schema.arguments
    names = [argument.name for argument in arguments]
    run = parameters(IMPLEMENTATIONS[name].run)
    assert [parameter.name for parameter in run] == names
    for argument, parameter in zip(arguments, run, strict=True):
        if argument.has_default_value():
            assert parameter.default == argument.default_value
    fake = [
        parameter for parameter in parameters(OPERATORS[name].fake) if parameter.kind is not parameter.VAR_POSITIONAL
    ]
    assert [parameter.name for parameter in fake] == names[: len(fake)]


def test_every_implementation_is_of_a_declared_operator() -> None:
    assert sorted(IMPLEMENTATIONS) == NAMES
