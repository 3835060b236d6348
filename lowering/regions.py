"""Cut a graph by decoder layer, and find the regions that are the same computation.

The layer index comes from the model's own module paths (`model.layers.7.self_attn`): a region is all nodes of one
layer; what stands in front of and behind the layers is left to the surrounding graph. Two regions are equal when
their nodes, local data flow, constants and input shapes are.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import fx

from specpass.graph.walk import module_path

APART = "specpass_apart"  # in a node's metadata: its layer is like no other and stays outside
_SYMBOL = re.compile(r"\b[su]\d+\b")
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclasses.dataclass
class Region:
    """Nodes of one layer in graph order, what they read from outside, and what is read of them outside."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]

    def key(self) -> str:
        """Equal keys, equal computations."""
        number: dict[fx.Node, str] = {node: f"i{index}" for index, node in enumerate(self.inputs)}
        lines = _rename([_describe(node) for node in self.inputs])
        for index, node in enumerate(self.nodes):
            number[node] = f"n{index}"
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(number[n]))
            lines.append(f"{node.target} {args} {sorted(kwargs.items())}")
        lines.append(" ".join(number[node] for node in self.outputs))
        return "\n".join(lines)


class _Name(str):
    __slots__ = ()
    __repr__ = str.__str__


def _rename(lines: list[str]) -> list[str]:
    """Symbols numbered by first appearance: layers differ in the names of sizes that nothing relates."""
    names: dict[str, str] = {}
    return [_SYMBOL.sub(lambda found: names.setdefault(found.group(), f"size{len(names)}"), line) for line in lines]


def _describe(node: fx.Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return f"{val.dtype} {val.device} {tuple(map(str, val.shape))} {tuple(map(str, val.stride()))}"
    return f"{type(val).__name__} {val}"


def layer_of(node: fx.Node) -> str | None:
    """Path of the decoder layer that a node belongs to, e.g. model.layers.7."""
    found = _LAYER.match(module_path(node))
    return found.group(1) if found else None


def find_regions(gm: fx.GraphModule) -> list[Region]:
    """One region a decoder layer, in order; none where layers do not follow each other without interleaving."""
    groups: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list, type(None))):
            layer = layer_of(node)
            if layer is not None:
                groups.setdefault(layer, []).append(node)
    regions = [close(nodes) for nodes in groups.values() if not any(APART in node.meta for node in nodes)]
    return regions if _in_order(regions) else []


def close(nodes: list[fx.Node]) -> Region:
    """The region of these nodes, with what crosses its border now (stitching a region changes its neighbours')."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                inputs[source] = None
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return Region(nodes, list(inputs), outputs)


def _in_order(regions: list[Region]) -> bool:
    """Each region's inputs come before its first node's place, so that it can run as one call."""
    rank = {node: index for index, region in enumerate(regions) for node in region.nodes}
    for index, region in enumerate(regions):
        for source in region.inputs:
            if rank.get(source, -1) > index or (
                source not in rank and source.op == "call_function" and _reads_layers(source, rank, index)
            ):
                return False
    return True


def _reads_layers(node: fx.Node, rank: dict[fx.Node, int], index: int, depth: int = 6) -> bool:
    """Whether an outside node depends on a region that does not come before `index`."""
    if depth == 0:
        return False
    for source in node.all_input_nodes:
        if rank.get(source, -1) >= index or (source not in rank and _reads_layers(source, rank, index, depth - 1)):
            return True
    return False
