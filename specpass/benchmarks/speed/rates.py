"""What the machine can do, measured: bytes per second of memory, FLOPs per second of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

ROUNDS = 25  # on a machine that others share the best of few is a matter of luck
ENOUGH_S = 4.0  # where a round is long, what others take of it is small


def _best(call: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of some rounds."""
    import torch

    best, end = float("inf"), time.perf_counter() + ENOUGH_S
    for _ in range(ROUNDS):
        if time.perf_counter() > end:
            break
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def bandwidth(device: str, mebibytes: int = 512) -> float:
    """Bytes per second: the faster of a copy (read and written bytes) and a sum (read bytes), larger than any cache."""
    import torch

    source = torch.ones(mebibytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    return max(2 * size / _best(lambda: target.copy_(source), device), size / _best(source.sum, device))


def matmul_rate(device: str, dtype: str, rows: int = 2048, inner: int = 2048, columns: int = 8192) -> float:
    """FLOPs per second (two per multiply-add) of [rows, inner] x [inner, columns] in `dtype`."""
    import torch

    kind = getattr(torch, dtype)
    left = torch.ones(rows, inner, dtype=kind, device=device)
    right = torch.ones(columns, inner, dtype=kind, device=device)
    return 2 * rows * inner * columns / _best(lambda: torch.nn.functional.linear(left, right), device)
