"""Random operands for a kernel, its error against float64, and its time; shared by the tuner and bench/gpu.py."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel, device_of
from specpass.kernels.tiles import Tile

FLUSH_BYTES = 256 * 2**20  # more than any second-level cache holds


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


def rewind(case: Case) -> Callable[[], None]:
    """What puts a case back to its start: a kernel that writes a token would run out of slots."""
    starts = {name: case.operands[name].clone() for name in case.kernel.advances}

    def back() -> None:
        for name, start in starts.items():
            case.operands[name].copy_(start)

    return back


def time_us(
    call: Callable[[], Any], device: str, *, cold: bool, before: Callable[[], None] = lambda: None, repeats: int = 25
) -> float:
    """Median microseconds of a call, the GPU's second-level cache flushed before each where `cold`.

    `before` runs ahead of each call, outside the time.
    """
    for _ in range(3):
        before()
        call()
    if not device.startswith("cuda"):
        spans = []
        for _ in range(repeats):
            before()
            start = time.perf_counter()
            call()
            spans.append((time.perf_counter() - start) * 1e6)
        return statistics.median(spans)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cold else None
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start_event, end_event in pairs:
        if flush is not None:
            flush.zero_()
        before()
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start_event.elapsed_time(end_event) * 1e3 for start_event, end_event in pairs)
