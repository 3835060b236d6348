"""Random operands for a kernel, its error against float64, and its time; shared by the tuner and bench/gpu.py."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from specpass.kernels.clock import Clock
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel, device_of
from specpass.kernels.tiles import Tile

GRAPH_US, MOST_CALLS = 2000, 50  # of a recording: long enough to outlast its own launch, short enough to repeat


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a kernel: its operator's operands by name."""

    kernel: Kernel
    shapes: Shapes
    operands: dict[str, Any]


def make_case(kernel: Kernel, shapes: Shapes, device: str, seed: int = 0) -> Case:
    """Fresh random operands."""
    return Case(kernel, shapes, kernel.make(shapes, device, seed))


def run(case: Case, tile: Tile | None = None) -> Any:
    """The kernel on a GPU; elsewhere what its operator does there."""
    return case.kernel.launch(case.operands, tile) if device_of(case.operands).type == "cuda" else fallback(case)


def fallback(case: Case) -> Any:
    """The same result by aten."""
    return case.kernel.reference(**case.operands)


def check(case: Case, tile: Tile | None = None) -> float:
    """Largest error against float64, as a share of what is allowed: at most 1 is right. Runs the kernel once."""
    found = run(case, tile)  # writes in place what the reference then reads
    return case.kernel.error(case.operands, found, case.shapes)


def nothing() -> None:
    """Runs before a call that leaves things as they were."""


def rewind(case: Case) -> Callable[[], None]:
    """What puts a case back to its start: a kernel that writes a token would run out of slots."""
    if not case.kernel.advances:
        return nothing
    starts = {name: case.operands[name].clone() for name in case.kernel.advances}

    def back() -> None:
        for name, start in starts.items():
            case.operands[name].copy_(start)

    return back


def time_us(
    call: Callable[[], Any], device: str, *, cold: bool, before: Callable[[], None] = nothing, repeats: int = 25
) -> float:
    """Median microseconds of a call, the GPU's second-level cache flushed before each where `cold`.

    `before` runs ahead of each call, outside the time. On a GPU several calls are replayed as one CUDA graph, less what
    the same graph takes without them. What no graph can hold is timed by events around Python, with a warning: launches
    count then.
    """
    if not device.startswith("cuda"):
        return _wall_us(call, before, repeats)
    clock = Clock(device)

    def ahead() -> None:
        if cold:
            clock.flush()
        before()

    def whole() -> None:
        ahead()
        call()

    clock.span_us(whole, nothing, 3)  # compiles and loads what is compiled and loaded on first use
    calls = max(1, min(MOST_CALLS, int(GRAPH_US / max(1.0, clock.span_us(whole, nothing, 3)))))
    try:
        replay = clock.record(lambda: _each(whole, calls))
        alone = clock.record(lambda: _each(ahead, calls)) if cold or before is not nothing else None
    except RuntimeError as error:
        warnings.warn(f"specpass: timed by events around Python: no CUDA graph holds the call ({error})", stacklevel=2)
        return clock.span_us(call, ahead, repeats)
    whole_us = clock.span_us(replay, nothing, repeats)
    if alone is None:
        return whole_us / calls
    # Behind a replay it starts when the device is free, not when its launch has arrived; which one long call outlasts.
    return (whole_us - clock.span_us(alone, replay if calls > 1 else nothing, repeats)) / calls


def _each(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def _wall_us(call: Callable[[], Any], before: Callable[[], None], repeats: int) -> float:
    spans = []
    for turn in range(-3, repeats):  # three to warm up
        before()
        start = time.perf_counter()
        call()
        if turn >= 0:
            spans.append((time.perf_counter() - start) * 1e6)
    return statistics.median(spans)
