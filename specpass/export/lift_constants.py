"""lift_constants: tensors that a method made from numbers become inputs, the last of them.

before: c = self._tensor_constant0; y = lift_fresh_copy(c)
after:  y = constant__tensor_constant0                              an input, whose tensor is in Constants
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from specpass.graph.aten import Copied
from specpass.rewrite import Facts, Pass, Request


@dataclasses.dataclass(frozen=True)
class Constants:
    """Tensors of lifted inputs, by the name of the attribute that they were, in the inputs' order."""

    tensors: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class LiftConstants(Pass):
    name: ClassVar[str] = "lift_constants"
    provides: ClassVar[tuple[type, ...]] = (Constants,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        graph, tensors = gm.graph, {}
        last = graph.find_nodes(op="placeholder")[-1]
        for node in list(graph.find_nodes(op="get_attr")):
            tensor = getattr(gm, node.target)
            if not isinstance(tensor, torch.Tensor):
                continue  # the body of a loop
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{node.target}")
            last.meta["val"] = node.meta.get("val", tensor)
            tensors[str(node.target)] = tensor
            node.replace_all_uses_with(last)
            graph.erase_node(node)
        for copied in Copied.find(graph):  # torch.tensor(...) copies its constant, in place
            copied.node.replace_all_uses_with(copied.input)
            graph.erase_node(copied.node)
        facts.add(Constants(tensors))
