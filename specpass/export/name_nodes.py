"""name_nodes: nodes carry the path that their ONNX nodes will be named by: `model.layers.3.self_attn.select`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import NAMESPACE, operator_name
from specpass.graph.edit import copy_module
from specpass.graph.operands import GetItem
from specpass.graph.walk import module_path
from specpass.rewrite import Facts, Kind, Pass, Pipeline, Request


@dataclasses.dataclass(frozen=True)
class NameNodes(Pass):
    """`prefix`: in front of each path: `draft` for a draft's nodes."""

    prefix: str = ""

    name: ClassVar[str] = "name_nodes"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        for node in gm.graph.nodes:
            if node.op != "call_function" or GetItem.match(node) is not None:
                continue
            parts = [self.prefix, module_path(node)]
            if getattr(node.target, "namespace", "") == NAMESPACE:
                parts.append(operator_name(node))
            path = ".".join(part for part in parts if part)
            kind = next((kind for _, kind in (node.meta.get("nn_module_stack") or {}).values()), fx.GraphModule)
            node.meta["nn_module_stack"] = {path: (path, kind)}
            node.meta["stack_trace"] = path or node.name  # nodes without one cost a walk of Python's stack, each time


def named(gm: fx.GraphModule, kind: Kind, prefix: str = "") -> fx.GraphModule:
    """A copy whose nodes carry their names."""
    return Pipeline((NameNodes(prefix),), entry="").run(copy_module(gm), Request(kind), Facts())
