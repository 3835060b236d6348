"""Editing FX graphs: all new nodes carry fake values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph's fake values belong to."""
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise ValueError("the graph holds no fake tensor")


@contextlib.contextmanager
def quiet(mode: FakeTensorMode) -> Iterator[None]:
    """Run fake operators without adding guards to the shape environment that Dynamo will check on each call.

    Composite operators go by Python's decompositions: those in C++ ask CUDA tensors for sizes that are numbers.
    """
    env = mode.shape_env
    unguarded = env.suppress_guards() if env is not None else contextlib.nullcontext()
    with enable_python_dispatcher(), mode, torch.no_grad(), unguarded:
        yield


class Editor:
    """Inserts nodes with fake values. `like` gives a new node its place in the module tree (its region)."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.mode = fake_mode_of(gm)
        self.copies: dict[tuple[fx.Node, torch.device], fx.Node] = {}

    def call(self, target: Any, *args: Any, before: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """`target(*args)` as a node in front of `before`."""
        target = getattr(target, "default", target)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        return self.refresh(node, like)

    def call_module(self, name: str, *args: Any, before: fx.Node, val: Any) -> fx.Node:
        """The submodule `name` on `args` as a node in front of `before`, whose fake value is `val`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_module(name, args)
        node.meta["val"] = val
        return node

    def refresh(self, node: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """Recompute the node's fake value from its arguments."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with quiet(self.mode):
            node.meta["val"] = node.target(*args, **kwargs)
        if like is not None:
            for name in ("nn_module_stack", "stack_trace"):
                if name in like.meta:
                    node.meta[name] = like.meta[name]
        return node

    def item(self, node: fx.Node, index: int, before: fx.Node) -> fx.Node:
        """`node[index]`; reads the value without running an operator."""
        import operator

        with self.graph.inserting_before(before):
            out = self.graph.call_function(operator.getitem, (node, index))
        out.meta["val"] = node.meta["val"][index]
        if "nn_module_stack" in node.meta:
            out.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        return out

    def beside(self, node: fx.Node, other: fx.Node, before: fx.Node) -> fx.Node:
        """`node` on the device of `other`: itself where it is there, else a copy, one for each device."""
        device = other.meta["val"].device
        if node.meta["val"].device == device:
            return node
        copy = self.copies.get((node, device))
        if copy is None or not copy < before:
            with self.graph.inserting_before(before):
                copy = self.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"device": device})
            self.copies[node, device] = self.refresh(copy)
        return copy

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let the users of `old` read `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, with its nodes' metadata; passes go on changing the original.

    Its code is written when it is first called, as that of Dynamo's graphs is: most copies are changed before.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    for old, new in env.items():
        new.meta = dict(old.meta)
    return _LazyGraphModule(gm, graph)
