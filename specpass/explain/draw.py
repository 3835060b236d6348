"""One decoder layer before and after the passes, as a picture: dot text, or SVG."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from torch import fx

from specpass.explain.layer import Layer, layer_of
from specpass.files import write_file


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
        from specpass.explain.svg import svg

        write_file(path, svg(*layers))
