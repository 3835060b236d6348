"""What is drawn of a decoder layer: nodes, labels, edges.

Views, casts and size arithmetic are left out (their neighbours are joined), so that a layer fits on a page.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from specpass.dialect.attention import ModifiedAttention, PrefillAttention
from specpass.dialect.rows import AppendIds
from specpass.dialect.sparse import PrefillAttentionSparse
from specpass.graph.aten import Sdpa
from specpass.graph.walk import value
from specpass.lowering.regions import find_regions

ATTENTION = (Sdpa, ModifiedAttention, PrefillAttention, PrefillAttentionSparse)
_HIDDEN = frozenset(
    {
        "view",
        "reshape",
        "transpose",
        "unsqueeze",
        "squeeze",
        "expand",
        "slice",
        "select",
        "to",
        "_to_copy",
        "contiguous",
        "clone",
        "getitem",
        "alias",
        "detach",
        "permute",
        "split",
        "t",
        "neg",
    }
)


@dataclasses.dataclass
class Layer:
    """Nodes to draw, name -> label, in graph order; edges between names; the names that specpass put there."""

    title: str
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    edges: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    ours: set[str] = dataclasses.field(default_factory=set)


def layer_of(gm: fx.GraphModule, title: str, index: int = 0) -> Layer:
    """Layer `index` of a TRACED or PRUNED prefill graph."""
    region = find_regions(gm)[index]
    names = _size_names(gm)
    layer = Layer(title)
    shown: dict[fx.Node, set[str]] = {}  # node -> drawn nodes that its value comes from

    def sources(node: fx.Node) -> set[str]:
        return set().union(*(shown.get(parent, set()) for parent in node.all_input_nodes))

    for node in region.inputs:
        if isinstance(node.meta.get("val"), torch.Tensor) and not _is_weight(node):
            layer.labels[node.name] = f"{node.name} {_shape(node, names)}"
            shown[node] = {node.name}
    for node in region.nodes:
        ours = getattr(node.target, "namespace", "") == "specpass"
        if _op(node) in _HIDDEN and not ours:
            shown[node] = sources(node)
            continue
        layer.labels[node.name] = f"{_op(node)} {_shape(node, names)}".strip()
        layer.edges += [(source, node.name) for source in sorted(sources(node))]
        shown[node] = {node.name}
        if ours:
            layer.ours.add(node.name)
    used = {name for edge in layer.edges for name in edge}
    layer.labels = {name: label for name, label in layer.labels.items() if name in used}
    return layer


def _op(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _is_weight(node: fx.Node) -> bool:
    """An input of the graph whose sizes are all constants."""
    val = node.meta["val"]
    return node.op in ("placeholder", "get_attr") and all(isinstance(dim, int) for dim in val.shape) and val.dim() > 0


def _size_names(gm: fx.GraphModule) -> dict[str, str]:
    """Symbol -> the name that the documentation uses, read off the first attention site."""
    query = next(site.query for view in ATTENTION for site in view.find(gm.graph))
    batch, _, columns, _ = value(query).shape
    drafted = bool(AppendIds.find(gm.graph))
    return {str(batch): "B", str(columns): "(S+L)" if drafted else "S"}


def _shape(node: fx.Node, names: dict[str, str]) -> str:
    val = node.meta.get("val")
    tensors = [val] if isinstance(val, torch.Tensor) else [v for v in val or () if isinstance(v, torch.Tensor)]

    def one(tensor: torch.Tensor) -> str:
        sizes = []
        for dim in tensor.shape:
            text = str(dim)
            for symbol, name in names.items():
                if not symbol.isdigit():
                    text = text.replace(symbol, name)
            sizes.append(text)
        return f"[{', '.join(sizes)}]"

    return " ".join(map(one, tensors))
