"""What each method kept of a prompt: a PNG (position across, layer and KV head down) and a page to hover over."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specpass.files import write_file
from specpass.observe.kept import binned, matrix_of

if TYPE_CHECKING:
    from specpass.demo.prompt import Prompt
    from specpass.demo.result import Result

_TEMPLATE = "kept.html.jinja"


def kept_matrix(result: Result, length: int) -> np.ndarray:
    """[layers * KV heads, S] bool: what each head kept of a prompt of `length` tokens.

    Raises: ValueError: the result kept everything (full KV).
    """
    if result.kept is None:
        raise ValueError(f"{result.method} kept everything; there is nothing to draw")
    return matrix_of(result.kept, length)


def png(results: Sequence[Result], prompt: Prompt, title: str) -> bytes:
    """One panel for each method that pruned; the answer's place is marked in all of them."""
    from matplotlib.figure import Figure

    pruned = [result for result in results if result.kept is not None]
    figure = Figure(figsize=(12, 1.2 + 1.7 * max(len(pruned), 1)), layout="constrained")
    figure.suptitle(f"What each method kept (blue) of the prompt; the answer's place is red\n{title}", fontsize=11)
    axes = figure.subplots(max(len(pruned), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axis, result in zip(axes, pruned, strict=False):
        matrix = kept_matrix(result, len(prompt))
        axis.imshow(
            binned(matrix),
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, len(prompt), len(matrix), 0),
        )
        axis.axvspan(prompt.answer.start, prompt.answer.stop, color="tab:red", alpha=0.2, linewidth=0)
        for edge in (prompt.answer.start, prompt.answer.stop):
            axis.axvline(edge, color="tab:red", linewidth=1)
        inside = matrix[:, prompt.answer.start : prompt.answer.stop].mean()
        axis.set_title(
            f"{result.method}: {'right' if result.right else 'wrong'} answer; {inside:.0%} of the answer's "
            "tokens kept, over all layers and KV heads",
            fontsize=10,
            loc="left",
        )
        axis.set_ylabel("layer, KV head", fontsize=9)
        heads = len(result.kept[0]) if result.kept else 1
        ticks = range(0, len(matrix), max(heads, heads * (len(matrix) // heads // 4)))
        axis.set_yticks(list(ticks), [str(tick // heads) for tick in ticks])
    axes[-1].set_xlabel("prompt position")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def page_data(results: Sequence[Result], prompt: Prompt) -> list[dict[str, Any]]:
    """For each method, by token: how many (layer, head) pairs kept it, and in how many layers."""
    found = []
    for result in results:
        if result.kept is None:
            continue
        matrix = kept_matrix(result, len(prompt))
        layers = np.any(matrix.reshape(len(result.kept), -1, len(prompt)), axis=1)
        found.append(
            {
                "method": result.method,
                "right": result.right,
                "heads": matrix.sum(0).tolist(),
                "layers": layers.sum(0).tolist(),
                "all_heads": len(matrix),
                "all_layers": len(layers),
            }
        )
    return found


def page(results: Sequence[Result], prompt: Prompt, title: str) -> str:
    """A self-contained HTML page: the prompt's tokens, shaded by how many heads kept them; hovering says who."""
    from jinja2 import Environment

    template = resources.files("specpass.demo").joinpath(_TEMPLATE).read_text("utf-8")
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title,
            results=results,
            methods=page_data(results, prompt),
            tokens=prompt.tokens,
            answer={"start": prompt.answer.start, "stop": prompt.answer.stop},
        )
    )


def draw(folder: Path, results: Sequence[Result], prompt: Prompt, title: str) -> list[Path]:
    """Write kept.png and kept.html into `folder`; returns their paths. Raises: OutputFileError."""
    files: dict[str, str | bytes] = {"kept.png": png(results, prompt, title), "kept.html": page(results, prompt, title)}
    for name, content in files.items():
        write_file(folder / name, content)
    return [folder / name for name in files]
