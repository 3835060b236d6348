"""Means over prompts with bootstrap intervals, as data and as a markdown table."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from typing import Any

from specpass.benchmarks.quality.variants import FULL

RESAMPLES = 2000


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each method, budget and length: mean score, retention, scores by task.

    Retention is the mean score over full KV's on the same prompts; None without those. Intervals are the central 95 %
    of means over prompts drawn with replacement, the same prompts for a method and full KV.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["budget"], record["length"]), []).append(record)
    full = {_prompt(record): record["score"] for key, group in groups.items() if key[0] == FULL for record in group}
    return [_entry(key, group, full) for key, group in groups.items()]


@functools.cache
def _draws(count: int) -> Any:
    """[RESAMPLES, count] numbers of prompts, by Python's generator: numpy's may change with its release."""
    import numpy as np

    rng = random.Random(count)
    return np.array([rng.choices(range(count), k=count) for _ in range(RESAMPLES)])


def _prompt(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["task"], record["length"], record["seed"]


def _entry(key: tuple[Any, ...], group: list[dict[str, Any]], full: dict[tuple[Any, ...], float]) -> dict[str, Any]:
    import numpy as np

    method, budget, length = key
    scores = np.array([record["score"] for record in group])
    draws = _draws(len(scores))
    means = scores[draws].mean(1)
    by_task: dict[str, list[float]] = {}
    for record in group:
        by_task.setdefault(record["task"], []).append(record["score"])
    entry = {
        "method": method,
        "budget": budget,
        "length": length,
        "prompts": len(group),
        "score": _round(scores.mean()),
        "score_interval": _interval(means),
        "retention": None,
        "retention_interval": None,
        "tasks": {task: _round(np.mean(found)) for task, found in by_task.items()},
    }
    if all(_prompt(record) in full for record in group):
        reference = np.array([full[_prompt(record)] for record in group])
        references = reference[draws].mean(1)
        if reference.mean() > 0:
            entry["retention"] = _round(scores.mean() / reference.mean())
            entry["retention_interval"] = _interval(means[references > 0] / references[references > 0])
    return entry


def _round(value: Any) -> float:
    return round(float(value), 4)


def _interval(values: Any) -> list[float]:
    import numpy as np

    return [_round(value) for value in np.quantile(values, (0.025, 0.975))]


def markdown(summary: list[dict[str, Any]]) -> str:
    """The summary as a table: method, budget, length, prompts, score, retention, then tasks."""
    tasks = list(dict.fromkeys(task for entry in summary for task in entry["tasks"]))
    rows = [["method", "budget", "prompt tokens", "prompts", "score (95 %)", "of full KV (95 %)", *tasks]]
    for entry in sorted(summary, key=lambda entry: (entry["length"], entry["budget"] or 0)):
        score = _with_interval(entry["score"], entry["score_interval"])
        retention = _with_interval(entry["retention"], entry["retention_interval"])
        budget = "-" if entry["budget"] is None else str(entry["budget"])
        scores = [f"{entry['tasks'][task]:.2f}" if task in entry["tasks"] else "-" for task in tasks]
        rows.append([entry["method"], budget, str(entry["length"]), str(entry["prompts"]), score, retention, *scores])
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """Rows as a markdown table, the first being its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]) + "\n"


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.2f}-{interval[1]:.2f})"
