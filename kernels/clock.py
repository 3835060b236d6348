"""A GPU's time: by events around calls from Python, and what calls launch recorded as one CUDA graph.

A launch from Python takes tens of microseconds, longer than a small kernel: events around it time Python. In a replayed
graph kernels follow one another as they do in a step that is one graph.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from specpass.kernels.recording import record

FLUSH_BYTES = 256 * 2**20  # more than any second-level cache holds


class Clock:
    """Of one device. Tests put a stand-in in its place."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._written: torch.Tensor | None = None

    def flush(self) -> None:
        """Put something else in the second-level cache."""
        if self._written is None:
            self._written = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        self._written.zero_()

    def span_us(self, call: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
        """Median microseconds of a call between two events, `before` run ahead of each."""
        with torch.cuda.device(self.device):
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
            for start, end in pairs:
                before()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) * 1e3 for start, end in pairs)

    def record(self, run: Callable[[], object]) -> Callable[[], object]:
        """What `run` launches, as one launch; nothing is run here.

        Raises: RuntimeError: it does what a graph cannot hold, such as waiting for the device.
        """
        return record(run, torch.device(self.device))[1]
