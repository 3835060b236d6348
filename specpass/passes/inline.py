"""Inline: a method's own torch function becomes nodes of the graph, one copy at each site.

The function is traced on the site's fake values; what needs a number from the device (`.item()`, a loop over a tensor)
cannot be traced and is an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.errors import MethodHookError
from specpass.graph.edit import Editor, quiet
from specpass.graph.operands import returned


class Inline:
    """`function(*tensors) -> tensor` as nodes; traced once for equal argument shapes."""

    def __init__(self, editor: Editor, function: Callable[..., Any], name: str) -> None:
        self.editor, self.function, self.name = editor, function, name
        self.traced: dict[str, fx.GraphModule] = {}

    def __call__(self, *args: fx.Node, before: fx.Node, like: fx.Node | None) -> fx.Node:
        """Insert the function's nodes in front of `before`; returns the node of its result.

        Raises: MethodHookError where the function cannot be traced or does not return one tensor.
        """
        values = [node.meta["val"] for node in args]
        key = str([(val.dtype, val.device, tuple(val.shape), val.stride()) for val in values])
        if key not in self.traced:
            self.traced[key] = self._trace(values)
        graph = self.traced[key].graph
        env: dict[fx.Node, fx.Node] = dict(zip(graph.find_nodes(op="placeholder"), args, strict=True))
        with self.editor.graph.inserting_before(before):
            for node in graph.nodes:
                if node.op == "get_attr":
                    raise MethodHookError(
                        f"{self.name} uses a tensor that it did not get as an argument: make it inside, from numbers."
                    )
                if node.op == "call_function":
                    new = env[node] = self.editor.graph.node_copy(node, lambda n: env[n])
                    new.meta = {"val": node.meta["val"]}
                    for name in ("nn_module_stack", "stack_trace"):
                        if like is not None and name in like.meta:
                            new.meta[name] = like.meta[name]
        return env[returned(graph)]

    def _trace(self, values: list[Any]) -> fx.GraphModule:
        try:
            with quiet(self.editor.mode):
                traced = make_fx(self.function, pre_dispatch=True)(*values)
        except Exception as error:
            raise MethodHookError(
                f"{self.name} cannot be traced into the graph ({type(error).__name__}: {error}). Use torch operations "
                "on its arguments only: no .item(), no branch on a tensor's values."
            ) from error
        result = returned(traced.graph)
        if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), torch.Tensor):
            raise MethodHookError(f"{self.name} must return one tensor that it computed, not {result!r}.")
        return traced


def check_result(node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype, name: str, meaning: str) -> fx.Node:
    """The node, if its fake value is `dtype` of `shape`.

    Raises: MethodHookError
    """
    val = node.meta["val"]
    if (
        val.dtype != dtype
        or len(val.shape) != len(shape)
        or any(str(ours) != str(theirs) for ours, theirs in zip(val.shape, shape, strict=True))
    ):
        raise MethodHookError(f"{name} returned {val.dtype} {tuple(val.shape)}, expected {meaning}: {dtype} {shape}.")
    return node
