"""One decoder layer before and after the passes, as a picture: dot text, or SVG.

Views, casts and size arithmetic are left out (their neighbours are joined), so that a layer fits on a page.
"""

from __future__ import annotations

import dataclasses
import operator
import shutil
import subprocess
from pathlib import Path

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.files import write_file
from specpass.graph.walk import ATEN, find
from specpass.lowering.regions import find_regions

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
    site = find(gm.graph, ATEN.scaled_dot_product_attention, SPEC.modified_attention, SPEC.prefill_attention)[0]
    batch, _, columns, _ = site.args[0].meta["val"].shape
    drafted = bool(find(gm.graph, SPEC.append_ids))
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


def dot_text(*layers: Layer) -> str:
    """The layers as one dot graph, a cluster each; specpass's operators are filled."""
    lines = ["digraph specpass {", '  node [shape=box, fontname="Helvetica", fontsize=10];', "  rankdir=TB;"]
    for number, layer in enumerate(layers):
        lines += [f"  subgraph cluster_{number} {{", f'    label="{layer.title}";']
        for name, label in layer.labels.items():
            style = ', style=filled, fillcolor="#ffd166"' if name in layer.ours else ""
            lines.append(f'    "{number}_{name}" [label="{label}"{style}];')
        lines += [f'    "{number}_{a}" -> "{number}_{b}";' for a, b in layer.edges]
        lines.append("  }")
    return "\n".join([*lines, "}", ""])


def draw(before: fx.GraphModule, after: fx.GraphModule, path: Path) -> None:
    """Write one layer before and after to `path` (.dot or .svg).

    Raises: OutputFileError: the file cannot be written.
    """
    layers = layer_of(before, "before"), layer_of(after, "after")
    text = dot_text(*layers)
    if path.suffix == ".dot":
        write_file(path, text)
    elif shutil.which("dot"):
        write_file(path, subprocess.run(["dot", "-Tsvg"], input=text.encode(), capture_output=True, check=True).stdout)
    else:
        from specpass.graph_svg import svg

        write_file(path, svg(*layers))
