"""Layers as SVG by matplotlib, for machines without Graphviz: rows by depth, columns by where the inputs stand."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specpass.explain.layer import Layer

WIDTH, HEIGHT = 3.4, 0.55  # inches of a column and of a row


def places(layer: Layer) -> dict[str, tuple[float, int]]:
    """Name -> (x, depth): depth is the longest way from an input, x keeps nodes of one depth apart."""
    parents: dict[str, list[str]] = defaultdict(list)
    for source, node in layer.edges:
        parents[node].append(source)
    depth: dict[str, int] = {}
    for name in layer.labels:  # in graph order, so parents come first
        depth[name] = max((depth[parent] + 1 for parent in parents[name]), default=0)
    rows: dict[int, list[str]] = defaultdict(list)
    for name in layer.labels:
        rows[depth[name]].append(name)
    found: dict[str, tuple[float, int]] = {}
    for row in sorted(rows):
        wish = {
            name: sum(found[p][0] for p in parents[name]) / len(parents[name]) if parents[name] else 0.0
            for name in rows[row]
        }
        names = sorted(rows[row], key=lambda name: wish[name])
        middle = sum(wish.values()) / len(wish)
        for index, name in enumerate(names):
            found[name] = (middle + index - (len(names) - 1) / 2, row)
    return found


def svg(*layers: Layer) -> bytes:
    """The layers side by side; specpass's operators are filled."""
    from matplotlib.figure import Figure

    laid = [places(layer) for layer in layers]
    spans = [(min(x for x, _ in at.values()) - 0.6, max(x for x, _ in at.values()) + 0.6) for at in laid]
    rows = max(y for at in laid for _, y in at.values()) + 1
    figure = Figure(figsize=(WIDTH * sum(b - a for a, b in spans), HEIGHT * (rows + 2)))
    axes = figure.subplots(1, len(layers), width_ratios=[b - a for a, b in spans], squeeze=False)[0]
    for axis, layer, at, span in zip(axes, layers, laid, spans, strict=True):
        axis.set_title(layer.title)
        axis.set_xlim(*span)
        axis.set_ylim(rows, -1)
        axis.axis("off")
        for source, node in layer.edges:
            axis.annotate(
                "",
                at[node],
                at[source],
                zorder=1,
                arrowprops={"arrowstyle": "->", "color": "#888888", "shrinkA": 8, "shrinkB": 8},
            )
        for name, label in layer.labels.items():
            color = "#ffd166" if name in layer.ours else "#ffffff"
            axis.text(
                *at[name],
                label,
                ha="center",
                va="center",
                fontsize=8,
                zorder=2,
                bbox={"boxstyle": "round", "facecolor": color, "edgecolor": "#444444"},
            )
    out = io.BytesIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    return out.getvalue()
