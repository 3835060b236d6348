"""Reading FX graphs: which operator a node calls, what it depends on, where in the model it stands."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

_ROOT = re.compile(r"^[LG]\['\w+'\]\.?")  # how Dynamo names the module that it was called with
ATEN = torch.ops.aten
Size: TypeAlias = "torch.SymInt | sympy.Expr"  # a symbolic size, or its expression
VIEWS = (ATEN.reshape, ATEN.view, ATEN._unsafe_view)


def is_op(node: object, *packets: Any) -> bool:
    """Whether `node` calls one of the operator packets (any overload)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return getattr(node.target, "overloadpacket", node.target) in packets


def find(graph: fx.Graph, *packets: Any) -> list[fx.Node]:
    """Nodes of the graph, in order, that call one of the packets."""
    return [node for node in graph.nodes if is_op(node, *packets)]


def value(argument: object) -> Any:
    """The fake value of a node, or the constant itself."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def is_size(size: object, columns: Size) -> bool:
    """Whether `size` is the symbolic size `columns` (a SymInt or its expression)."""
    expr = columns.node.expr if isinstance(columns, torch.SymInt) else columns
    return isinstance(size, torch.SymInt) and size.node.expr == expr


def depends(val: object, columns: Size) -> bool:
    """Whether a number, or some size or stride of a value or of a list's items, has a symbol of `columns` in it."""
    expr = columns.node.expr if isinstance(columns, torch.SymInt) else columns
    if isinstance(val, torch.SymInt):
        return bool(expr.free_symbols & val.node.expr.free_symbols)
    if isinstance(val, torch.Tensor):
        return any(depends(dim, expr) for dim in (*val.shape, *val.stride()))
    return isinstance(val, (list, tuple)) and any(depends(item, expr) for item in val)


def first_call(graph: fx.Graph) -> fx.Node:
    """The first node that is no input."""
    return next(node for node in graph.nodes if node.op != "placeholder")


def output_of(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def module_path(node: fx.Node) -> str:
    """The model's own module path of a node (`model.layers.0.self_attn`), or ''."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    return _ROOT.sub("", list(stack.values())[-1][0])


def ancestors(node: fx.Node) -> list[fx.Node]:
    """Nodes that `node` depends on, itself included, in graph order."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return sorted(seen)


def behind(node: fx.Node) -> set[fx.Node]:
    """All nodes that depend on `node`."""
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.users)
    return seen


FULL = (1 << 63) - 1


def skip_full_slices(node: fx.Node) -> fx.Node:
    """Step over `x[:, :]` spelled as aten.slice over the whole axis."""
    while is_op(node, ATEN.slice) and tuple(node.args[2:4]) in ((0, FULL), (None, None)) and len(node.args) < 5:
        node = node.args[0]
    return node
