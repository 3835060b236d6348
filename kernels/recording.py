"""Record what a call launches on a GPU as one CUDA graph."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


def record(run: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """What `run` returns, which holds nothing yet, and what fills it; other threads may go on using the device.

    Raises: RuntimeError: `run` does what a graph cannot hold, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(capture_stream(device)), collector_rests():
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = run()
        finally:
            graph.capture_end()
    return outputs, graph.replay


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: cuBLAS has a workspace for every stream that it saw."""
    return torch.cuda.Stream(device)


@contextmanager
def collector_rests() -> Iterator[None]:
    """What the garbage collector destroys may be CUDA's, and that would end a recording."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
