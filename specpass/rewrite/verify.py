"""What holds of every graph between passes: it is well formed, and its nodes' fake values are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specpass.graph.edit import fake_mode_of, quiet


class StageError(AssertionError):
    """A pass left a graph that its stage forbids, or a fact unsaid: a bug of specpass, not of its user."""


def verify(gm: fx.GraphModule, name: str, *, full: bool = False) -> None:
    """Lint, fake values, and no Python object among the operands.

    Passes give each node they insert a fake value, which is checked to be there; `full=True` propagates fake values
    through the whole graph once more and compares the shapes (seconds for a large model: tests do it).

    Raises: StageError naming the pass and the node.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op not in ("output", "get_attr") and "val" not in node.meta and _returns(node):
            raise StageError(f"after {name}: node {node.name} has no fake value")
        for argument in (*node.args, *node.kwargs.values()):
            if not _is_plain(argument):
                raise StageError(f"after {name}: node {node.name} takes the Python object {type(argument).__name__}")
    if full:
        propagate(gm, name)


def _returns(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def _is_plain(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return all(_is_plain(item) for item in argument)
    if isinstance(argument, dict):
        return all(_is_plain(item) for item in argument.values())
    plain = (fx.Node, int, float, str, bool, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return argument is None or isinstance(argument, plain)


def propagate(gm: fx.GraphModule, name: str) -> None:
    """Run the graph on its inputs' fake values and compare every shape with what the nodes say."""
    env: dict[fx.Node, Any] = {}
    interpreter = fx.Interpreter(gm)
    with quiet(fake_mode_of(gm)):
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                env[node] = node.meta["val"]
            elif node.op != "output":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
                env[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
                if _shapes(env[node]) != _shapes(node.meta.get("val")):
                    raise StageError(
                        f"after {name}: {node.name} says {_shapes(node.meta.get('val'))}, is {_shapes(env[node])}"
                    )


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(str(dim) for dim in value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(item) for item in value)
    return None
