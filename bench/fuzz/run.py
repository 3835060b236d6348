"""A run: cases in groups of one compiled model, failures shrunk, a file after each group from which a rerun goes on."""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.fuzz.cases import Case, grouped, shrunk
from bench.fuzz.check import check
from bench.fuzz.subject import Subject
from specpass.benchmarks import results

Group: TypeAlias = tuple[tuple[str, str, float], list[Case]]  # a subject and its cases
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@dataclasses.dataclass
class Outcome:
    """What cases of one subject came to: `counts` of "right", "tie" and "wrong", and what was wrong."""

    subject: tuple[str, str, float]
    refusals: list[str]
    counts: dict[str, int]
    failures: list[dict[str, str]]

    @property
    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"subject": "/".join(map(str, self.subject))}


def verdict(case: Case, subject: Subject) -> tuple[str, str]:
    """("right" | "tie" | "wrong", what is wrong)."""
    try:
        return check(case, subject) or "right", ""
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def try_cases(key: tuple[str, str, float], cases: list[Case], progress: Progress | None = None) -> Outcome:
    """All cases of one subject, which is compiled once; the first failure of each kind is shrunk."""
    torch._dynamo.reset()
    gc.collect()  # the subject before this one
    subject, counts = Subject(*key), collections.Counter[str]()
    failures: dict[str, dict[str, str]] = {}
    for case in cases:
        found, why = verdict(case, subject)
        counts[found] += 1
        kind = why.split(":")[0] + why.partition(":")[2][:24]
        if why and kind not in failures:
            small = shrunk(case, lambda smaller: verdict(smaller, subject)[0] == "wrong")
            failures[kind] = {"case": small.text, "what": verdict(small, subject)[1] or why, "found as": case.text}
        if progress is not None:
            progress.advance(progress.task_ids[0])
    return Outcome(key, subject.refusals, dict(sorted(counts.items())), list(failures.values()))


def run(
    path: Path, seed: int, count: int, minutes: float, restart: bool = False, jobs: int = 1, **drawn: Any
) -> results.Store:
    """Try cases 0 .. count - 1 of a seed until `minutes` are over; what the file holds as right is not tried again.

    Args: jobs: processes, each with one group of cases at a time. drawn: see cases.draw.
    """
    usual = ((None,), (), False)
    settings = {"seed": seed, "cases": count} | {name: own for name, own in drawn.items() if own not in usual}
    store = results.Store(path, settings, ("subject",), restart, summary)
    end = time.perf_counter() + 60 * minutes
    groups = [
        (key, list(cases)) for key, cases in itertools.groupby(grouped(seed, count, **drawn), lambda case: case.subject)
    ]
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        progress.add_task("cases", total=count)
        due = []
        for key, cases in groups:
            done = ("/".join(map(str, key)),)
            if done in store and not store[done]["counts"].get("wrong"):
                progress.advance(progress.task_ids[0], len(cases))
            else:
                due.append((key, cases))
        for outcome in outcomes(due, end, jobs, progress):
            store.add(outcome.record)
            for failure in outcome.failures:
                progress.console.print(f"{failure['case']}\n  {failure['what']}", markup=False)
    return store


def outcomes(due: list[Group], end: float, jobs: int, progress: Progress) -> Iterator[Outcome]:
    """Of each group that is begun before `end`, as they come."""
    if jobs == 1:
        for key, cases in due:
            if time.perf_counter() < end:
                yield try_cases(key, cases, progress)
        return
    # A process serves a few groups and goes: what a compiled model leaves behind goes with it.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), quietly, max_tasks_per_child=8) as pool:
        waiting: set[Future[Outcome]] = set()
        groups = iter(due)
        while True:
            while len(waiting) < jobs and time.perf_counter() < end and (group := next(groups, None)) is not None:
                waiting.add(pool.submit(try_cases, *group))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                outcome = future.result()
                progress.advance(progress.task_ids[0], sum(outcome.counts.values()))
                yield outcome


def quietly() -> None:
    """Calls that warn are among the cases."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def summary(records: Any) -> dict[str, int]:
    """Cases tried, and how many were right, ties and wrong."""
    total = collections.Counter[str]()
    for record in records:
        total.update(record["counts"])
    return {"cases": sum(total.values()), **{name: total[name] for name in ("right", "tie", "wrong")}}
