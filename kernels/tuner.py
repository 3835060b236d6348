"""The tuner: for each kernel, shapes and architecture, find a tile that fits, does not spill, is right, and is fast.

candidates -> cost model (what cannot fit goes, the best few stay) -> compiled ahead of time, in parallel, spillers go
-> on a GPU of that architecture: checked against float64, timed -> the winner is stored. Without such a GPU the cost
model ranks, and the table's tile stays unless the model sees a clear gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, as_completed

from specpass.kernels import cost, store
from specpass.kernels.archs import Arch, device_arch
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel
from specpass.kernels.store import Entry, Key, Trial
from specpass.kernels.tiles import Tile

CLEAR_GAIN = 0.8  # of the default's predicted time; the model is not good enough for less


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to tune."""

    kernel: Kernel
    shapes: Shapes
    arch: Arch

    @property
    def key(self) -> Key:
        return Key.of(self.kernel, self.shapes, self.arch.kind)

    @property
    def refused(self) -> str | None:
        return self.kernel.refuse(self.shapes)


def compile_trial(job: Job, tile: Tile) -> Trial:
    """Compile one tile; runs in a worker process. Resources are those of the hungriest launch."""
    from specpass.kernels.aot import build

    predicted = cost.seconds(job.kernel, job.shapes, tile, job.arch)
    try:
        built = build(job.kernel, job.shapes, tile, job.arch)
    except Exception as error:  # a compiler's crash on one tile is one candidate less
        return Trial(tile, 0, 0, 0, predicted, error=f"{type(error).__name__}: {error}"[:200])
    regs, spills, shared = (max(getattr(part, name) for part in built) for name in ("regs", "spills", "shared_bytes"))
    unfit = None
    if spills:
        unfit = f"{spills} spilled loads and stores"
    elif shared > job.arch.shared:
        unfit = f"{shared} of {job.arch.shared} bytes of shared memory"
    return Trial(tile, regs, spills, shared, predicted, error=unfit)


def measure_trial(job: Job, trial: Trial) -> Trial:
    """Check and time a compiled tile on the GPU here."""
    from specpass.kernels.measure import check, make_case, rewind, run, time_us

    if trial.error is not None or trial.time_us is not None:
        return trial
    try:
        off = check(make_case(job.kernel, job.shapes, "cuda", seed=1), trial.tile)
        if not off <= 1.0:
            return dataclasses.replace(trial, error=f"wrong by {off:.1f} times the tolerance")
        case = make_case(job.kernel, job.shapes, "cuda")
        back = rewind(case)
        cold, warm = (time_us(lambda: run(case, trial.tile), "cuda", cold=flag, before=back) for flag in (True, False))
    except Exception as error:  # out of resources at launch, out of memory
        return dataclasses.replace(trial, error=f"{type(error).__name__}: {error}"[:200])
    return dataclasses.replace(trial, time_us=cold, warm_us=warm)


def can_measure(arch: Arch) -> bool:
    """Whether the GPU here is of this kind."""
    here = device_arch()
    return here is not None and here.kind == arch.kind


def pick(job: Job, trials: tuple[Trial, ...]) -> Trial | None:
    """The winner: the fastest measured tile; without measurements the default, or what the model puts far ahead."""
    fit = [trial for trial in trials if trial.error is None]
    timed = [trial for trial in fit if trial.time_us is not None]
    if timed:
        return min(timed, key=lambda trial: trial.time_us or 0.0)
    if not fit:
        return None
    best = min(fit, key=lambda trial: trial.predicted_s)
    default = next((t for t in fit if t.tile == job.kernel.default_tile(job.shapes, job.arch)), best)
    return best if best.predicted_s < CLEAR_GAIN * default.predicted_s else default


def finished(job: Job, measure: bool) -> Entry | None:
    """The stored entry, if nothing is left to do for it."""
    entry = store.load(job.key)
    if entry is None or entry.winner is None or (measure and not entry.measured):
        return None
    return entry


def tune(job: Job, tiles: list[Tile], workers: Executor | None, measure: bool, step: Callable[[], None]) -> Entry:
    """Tune one job and store it; each compiled tile is stored at once, so that a cut-off run goes on from there.

    Args: tiles: what to try. workers: compile there, None compiles here. step: called after each tile.
    """
    known = store.load(job.key)
    done = {trial.tile: trial for trial in (known.trials if known else ()) if trial.tile in tiles}
    for _ in done:
        step()
    for trial in _compiled(job, [tile for tile in tiles if tile not in done], workers):
        done[trial.tile] = trial
        store.save(Entry(job.key, tuple(done.values())))
        step()
    if measure:
        for tile, trial in list(done.items()):
            done[tile] = measure_trial(job, trial)
            store.save(Entry(job.key, tuple(done.values())))
    ordered = tuple(done[tile] for tile in tiles)
    entry = Entry(job.key, ordered, pick(job, ordered))
    store.save(entry)
    return entry


def _compiled(job: Job, tiles: list[Tile], workers: Executor | None) -> Iterator[Trial]:
    if workers is None:
        for tile in tiles:
            yield compile_trial(job, tile)
        return
    futures: list[Future[Trial]] = [workers.submit(compile_trial, job, tile) for tile in tiles]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
