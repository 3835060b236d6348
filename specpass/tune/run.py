"""Tune a list of jobs in compiler processes, with a progress bar."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specpass.kernels import cost, tuner
from specpass.kernels.store import Entry
from specpass.kernels.tuner import Job

console = Console(stderr=True, highlight=False)


def run(work: list[Job], count: int, processes: int) -> list[Entry]:
    """Tune what the store does not have, with a progress bar; returns all entries, in order."""
    for job in work:
        if job.refused is not None:
            console.print(f"{job.kernel.name}: stays with torch's operators: {job.refused}")
    work = [job for job in work if job.refused is None]
    measure = bool(work) and tuner.can_measure(work[0].arch)
    found = {job: entry for job in work if (entry := tuner.finished(job, measure)) is not None}
    todo = [job for job in work if job not in found]
    if not todo:
        console.print(f"nothing to do: all {len(work)} kernels are in the store")
        return list(found.values())
    if found:
        console.print(f"{len(found)} of {len(work)} kernels are in the store")
    if not measure:
        console.print(
            f"no {todo[0].arch.kind} GPU here: tiles are compiled, ranked by the cost model, not measured, and "
            "their numbers are not checked on a device"
        )
    lists = {job: cost.shortlist(job.kernel, job.shapes, job.arch, count) for job in todo}
    with workers(processes) as pool, _progress() as progress:
        bar = progress.add_task("", total=sum(map(len, lists.values())))
        for job, tiles in lists.items():
            progress.update(bar, description=f"{job.kernel.name} {job.shapes.budget or ''}")
            found[job] = tuner.tune(job, tiles, pool, measure, lambda: progress.advance(bar))
    console.print(f"tuned {len(todo)} kernels")
    return [found[job] for job in work]


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Executor | None]:
    """Compiler processes; None, which compiles here, where one is enough. They leave Ctrl-C to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = processes or cores
    if wanted == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        wanted, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
