"""How a kernel cuts its work. Which tiles are tried, and which serves where nothing was tuned, each spec says."""

from __future__ import annotations

import dataclasses

from specpass.kernels.archs import Arch
from specpass.kernels.shapes import Shapes


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Args:
        block_n: columns, slots or storage rows of a program's step. block_m: query rows of a step (importance).
        splits: programs that share a KV head's slots (decode). warps, stages: of the launch.
        precision: of dots of float32 operands; 16-bit ones are exact in any.
    """

    block_n: int
    block_m: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 2
    precision: str = "ieee"


def precision_for(shapes: Shapes, arch: Arch) -> str:
    """float32 on CUDA takes tensor cores three times; plain multiply-adds spill. AMD has float32 matrix cores."""
    return "tf32x3" if shapes.dtype == "float32" and arch.backend == "cuda" else "ieee"
