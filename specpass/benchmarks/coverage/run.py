"""All families, each probed in a process of its own with a limit; the file is written after each, a rerun goes on."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import resource
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specpass.benchmarks.coverage.families import left_out, registered
from specpass.benchmarks.results import Store
from specpass.errors import BenchmarkError

LIMIT_S = 600.0  # of one family, on a machine that others use too
MEMORY = 16 * 2**30  # bytes of address space
FAULTS = ("wrong", "error", "traceback")
SETTINGS = {"method": "speckv", "budget": 24, "window": 8, "lookahead": 4, "prompts": [13, 22, 41], "new_tokens": 8}


@dataclasses.dataclass(frozen=True)
class Run:
    """Args: only: families by name, all where empty. shard: (i, n), every n-th from the i-th on, counted from 1."""

    path: Path
    only: tuple[str, ...] = ()
    jobs: int = 1
    shard: tuple[int, int] = (1, 1)
    restart: bool = False
    limit: float = LIMIT_S

    def run(self) -> Store:
        """Probe what the file does not hold; families named in `only` anew.

        Raises: BenchmarkError: an unknown family, or a file of another machine or of other versions.
        """
        known = registered()
        unknown = sorted(set(self.only) - set(known))
        if unknown:
            raise BenchmarkError(f"{unknown[0]!r} is no causal language model of transformers, as `llama` is one.")
        store = Store(self.path, SETTINGS, ("family",), self.restart)
        index, count = self.shard
        wanted = [family for family in known[index - 1 :: count] if not self.only or family in self.only]
        missing = [family for family in wanted if self.only or (family,) not in store]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("families", total=len(missing))
            for record in self._records(missing):
                store.records[store.key_of(record)] = record
                store.records = dict(sorted(store.records.items()))
                store.save()
                progress.console.print(f"{record['family']}: {record['verdict']}")
                progress.advance(task)
        return store

    def _records(self, families: list[str]) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(lambda family: self.record(family, probe_alone), families)

    def record(self, family: str, probe: Callable[[Connection, str], None]) -> dict[str, Any]:
        """What `probe` sends of a family, or that it sent nothing in time."""
        why = left_out(family)
        if why:
            return {"family": family, "verdict": "left out", "reasons": [why]}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["specpass.benchmarks.coverage.probe"])  # torch is loaded once
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=probe, args=(theirs, family), daemon=True)
        process.start()
        theirs.close()
        try:
            if ours.poll(self.limit):
                record = ours.recv()
                process.join(10)  # killed, it would leave its semaphores behind
                return record
            fault = f"no result within {self.limit:.0f} s"
        except EOFError:
            process.join()
            fault = f"the process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join()
        return {"family": family, "verdict": "traceback", "faults": {"process": fault}}


def probe_alone(pipe: Connection, family: str) -> None:
    """In a process of its own: send a family's record."""
    import torch

    from specpass.benchmarks.coverage.probe import probe

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # what a failed trace has to say is in the record
    pipe.send(probe(family))
