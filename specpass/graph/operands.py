"""Typed views of nodes: an operator's operands by the names that its schema gives them.

    attention = Sdpa.of(node)
    attention.query, attention.is_causal        # nodes or numbers; what was left out is the schema's default
    attention.update(enable_gqa=True)           # written back to the node

A view is a subclass of Operands that declares the operands which passes read, with their types. Names are the schema's;
what a schema calls `self` is `input` here. Declaring a name that no overload has is an error at import.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, ClassVar, Self

from torch import fx

from specpass.graph.walk import is_op, output_of, value


@functools.cache
def _parameters(overload: Any) -> tuple[tuple[str, Any, bool], ...]:
    """(name, default, keyword only) of each argument of an overload."""
    return tuple(
        (_name(argument), argument.default_value, argument.kwarg_only) for argument in overload._schema.arguments
    )


def _name(argument: Any) -> str:
    return "input" if argument.name == "self" else argument.name


def operand_names(packet: Any) -> frozenset[str]:
    """Names that some overload of an operator gives its operands."""
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return frozenset(_name(argument) for overload in overloads for argument in overload._schema.arguments)


class Operands:
    """A call of one of `packets`, by operand. See the module's docstring."""

    packets: ClassVar[tuple[Any, ...]] = ()
    names: ClassVar[frozenset[str]] = frozenset()  # of the operands that the view declares
    node: fx.Node

    def __init_subclass__(cls, packets: Iterable[Any] = ()) -> None:
        cls.packets, cls.names = tuple(packets), frozenset(cls.__annotations__)
        hidden = [name for name in cls.names if hasattr(cls, name)]
        if hidden:
            raise TypeError(f"{cls.__name__}: the operands {hidden} would be hidden by the view's own attributes")
        for packet in cls.packets:
            unknown = cls.names - operand_names(packet)
            if unknown:
                raise TypeError(f"{cls.__name__}: {packet} has no operand {sorted(unknown)}")

    def __init__(self, node: fx.Node) -> None:
        if not self.is_call(node):
            raise TypeError(f"{node} is no call of {', '.join(map(str, self.packets))}")
        self.node = node

    @classmethod
    def of(cls, node: fx.Node) -> Self:
        """Raises: TypeError: the node calls something else."""
        return cls(node)

    @classmethod
    def match(cls, node: object) -> Self | None:
        """The view, or None where the node calls something else (or is no node)."""
        return cls(node) if cls.is_call(node) else None

    @classmethod
    def is_call(cls, node: object) -> bool:
        return is_op(node, *cls.packets)

    @classmethod
    def find(cls, graph: fx.Graph) -> list[Self]:
        """The graph's calls, in order."""
        return [cls(node) for node in graph.nodes if cls.is_call(node)]

    def operands(self) -> dict[str, Any]:
        """All operands by name, in the schema's order, defaults filled in."""
        given: list[Any] = list(self.node.args)
        found = {}
        for index, (name, default, keyword) in enumerate(_parameters(self.node.target)):
            if not keyword and index < len(given):
                found[name] = given[index]
            else:
                found[name] = self.node.kwargs.get(name, default)
        return found

    def fakes(self) -> dict[str, Any]:
        """`operands` with each node's fake value in its place."""
        return {name: value(operand) for name, operand in self.operands().items()}

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"{type(self).__name__} declares no operand {name!r}")
        return self.operands().get(name)  # None where this overload has no such operand

    def update(self, **changes: Any) -> None:
        """Give operands by name new values."""
        operands = self.operands()
        unknown = changes.keys() - operands.keys()
        if unknown:
            raise TypeError(f"{self.node.target} has no operand {sorted(unknown)}")
        parameters = _parameters(self.node.target)
        merged = operands | changes
        positional = [name for name, _, keyword in parameters if not keyword]
        changed = [positional.index(name) for name in changes if name in positional]
        count = max([len(self.node.args) - 1, *changed]) + 1
        kwargs = dict(self.node.kwargs)
        for name in positional[:count]:
            kwargs.pop(name, None)
        kwargs |= {name: merged[name] for name, _, keyword in parameters if keyword and name in changes}
        self.node.args = tuple(merged[name] for name in positional[:count])
        self.node.kwargs = kwargs


class GetItem:
    """`source[index]` of a node with several results."""

    source: fx.Node
    index: int

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.source, self.index = node.args

    @classmethod
    def match(cls, node: object) -> GetItem | None:
        return cls(node) if isinstance(node, fx.Node) and node.target is operator.getitem else None


def returned(graph: fx.Graph) -> Any:
    """What a graph returns: a node, or a tuple or list of nodes."""
    return output_of(graph).args[0]


def add_result(graph: fx.Graph, node: fx.Node) -> None:
    """Let a graph return one node more, behind what it returns."""
    output_of(graph).args = ((*results_of(graph), node),)


def results_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns, one or several."""
    result = returned(graph)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def items_of(node: fx.Node) -> dict[int, list[fx.Node]]:
    """getitem users of a node with several results, by index."""
    found: dict[int, list[fx.Node]] = {}
    for user in node.users:
        item = GetItem.match(user)
        if item is not None:
            found.setdefault(item.index, []).append(user)
    return found
