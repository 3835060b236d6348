"""Pictures of result files: quality over budget, speed over prompt length."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from specpass.benchmarks.quality.variants import DRAFT, FULL
from specpass.benchmarks.results import read_results
from specpass.errors import BenchmarkError
from specpass.files import write_file

_SIZE, _DPI = (8.0, 4.5), 140


def draw(path: Path, folder: Path) -> list[Path]:
    """PNG files of a result file, in `folder`, named after it.

    Raises: BenchmarkError: the file is of no command that has plots, or is empty. OutputFileError: see write_file.
    """
    document = read_results(path)
    kind = document["settings"].get("kind")
    pictures: dict[str, dict[str, Callable[[dict[str, Any]], bytes]]] = {
        "quality": {"accuracy": _accuracy, "retention": _retention},
        "speed": {"decode": _decode, "ttft": _ttft},
    }
    made = pictures.get(kind, {})
    if not made or not document["results"]:
        raise BenchmarkError(
            f"{path} holds nothing to plot: name a file that `specpass bench quality` or `specpass bench speed` wrote."
        )
    paths = []
    for name, picture in made.items():
        paths.append(folder / f"{path.stem}_{name}.png")
        write_file(paths[-1], picture(document))
    return paths


def _figure(panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0] * min(panels, 2), _SIZE[1]), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, list(axes)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _colour(number: int) -> Any:
    """Twenty that can be told apart, the ten strong ones first."""
    from matplotlib import color_sequences

    strong_and_pale = color_sequences["tab20"]
    return [*strong_and_pale[::2], *strong_and_pale[1::2]][number % 20]


def _accuracy(document: dict[str, Any]) -> bytes:
    """Mean score over budget, a panel for each prompt length; full KV and the draft as horizontal lines."""
    lengths = sorted({entry["length"] for entry in document["summary"]})
    figure, axes = _figure(len(lengths))
    for axis, length in zip(axes, lengths, strict=True):
        entries = [entry for entry in document["summary"] if entry["length"] == length]
        for entry in entries:
            if entry["budget"] is None:
                style = {FULL: "-", DRAFT: ":"}.get(entry["method"], "--")
                axis.axhline(entry["score"], color="black", ls=style, lw=1, label=entry["method"])
        _over_budget(axis, entries, "score", "score_interval")
        axis.set(
            title=f"prompts of {length:,} tokens",
            xlabel="budget (KV slots; prompt tokens for specpc)",
            ylabel="mean score, 95 % interval",
            ylim=(-0.03, 1.03),
        )
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _over_budget(axis: Any, entries: list[dict[str, Any]], value: str, interval: str) -> None:
    """A line with error bars for each method; methods are moved apart a little, so that their bars can be told."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries if entry["budget"] is not None))
    for number, method in enumerate(methods):
        found = sorted(
            (e for e in entries if e["method"] == method and e[value] is not None), key=lambda e: e["budget"]
        )
        if not found:
            continue
        shift = 1 + 0.02 * (number - len(methods) / 2)
        values, bars = _bars(found, value, interval)
        axis.errorbar(
            [e["budget"] * shift for e in found],
            values,
            yerr=bars,
            label=method,
            marker="s" if method.startswith("kvpress") else "o",
            ms=4,
            capsize=2,
            lw=1,
            ls="--" if method.startswith("kvpress") else "-",
            color=_colour(number),
        )
    budgets = sorted({entry["budget"] for entry in entries if entry["budget"] is not None})
    if budgets:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [f"{budget}" for budget in budgets])
        axis.minorticks_off()


def _bars(entries: list[dict[str, Any]], value: str, interval: str) -> tuple[list[float], list[list[float]]]:
    """Values, and the lengths of their error bars below and above."""
    values, bounds = [entry[value] for entry in entries], [entry[interval] for entry in entries]
    below = [max(0.0, middle - low) for middle, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - middle) for middle, (_, high) in zip(values, bounds, strict=True)]
    return values, [below, above]


def _retention(document: dict[str, Any]) -> bytes:
    """Score over full KV's score, a bar for each method and budget at the first length."""
    length = min(entry["length"] for entry in document["summary"])
    entries = [
        entry
        for entry in document["summary"]
        if entry["length"] == length and entry["retention"] is not None and entry["method"] != FULL
    ]
    figure, (axis,) = _figure()
    names = [f"{e['method']}" + (f" {e['budget']}" if e["budget"] else "") for e in entries]
    values, bars = _bars(entries, "retention", "retention_interval")
    colours = ["C1" if entry["method"].startswith("kvpress") else "C0" for entry in entries]
    axis.barh(names, values, xerr=bars, color=colours, alpha=0.8, capsize=2)
    axis.axvline(1.0, color="black", lw=1)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.set(title=f"prompts of {length:,} tokens", xlabel="score over full KV's score, 95 % interval")
    return _png(figure)


def _lines(
    document: dict[str, Any],
    field: Callable[[dict[str, Any]], float | None],
    floor: Callable[[dict[str, Any]], float | None],
    title: str,
) -> bytes:
    """A panel for each batch size; lines over S, floors dotted in the same colour."""
    results = [record for record in document["results"] if field(record) is not None]
    batches = sorted({record["batch"] for record in results}) or [1]
    figure, axes = _figure(len(batches))
    methods = list(dict.fromkeys((record["method"], record["budget"]) for record in results))
    for axis, batch in zip(axes, batches, strict=True):
        for number, (method, budget) in enumerate(methods):
            found = sorted(
                (r for r in results if (r["method"], r["budget"], r["batch"]) == (method, budget, batch)),
                key=lambda r: r["length"],
            )
            if found:
                lengths, colour = [r["length"] for r in found], _colour(number)
                axis.plot(
                    lengths,
                    [field(r) for r in found],
                    marker="o",
                    ms=4,
                    lw=1.2,
                    color=colour,
                    label=method if budget is None else f"{method} {budget}",
                )
                axis.plot(lengths, [floor(r) for r in found], ls=":", lw=1, color=colour)
        ticks: Iterable[int] = sorted({r["length"] for r in results})
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(ticks), [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set(title=f"batch {batch}", xlabel="prompt tokens S (dotted: floor)", ylabel=title)
    axes[0].legend(fontsize=7)
    return _png(figure)


def _decode(document: dict[str, Any]) -> bytes:
    return _lines(document, lambda r: r["decode_ms"], lambda r: r["decode_floor_ms"], "ms per decode step")


def _ttft(document: dict[str, Any]) -> bytes:
    return _lines(document, lambda r: r["ttft_s"], lambda r: r["ttft_floor_s"], "seconds to the first token")
