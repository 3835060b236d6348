"""Tile tables: the tile of each kernel where nothing was tuned, and the tiles that the tuner tries."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from specpass.kernels.archs import Arch
from specpass.kernels.shapes import Shapes, block_of

KERNELS = ("importance", "importance_given_lse", "gather", "decode", "decode_append")


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


def splits_for(shapes: Shapes, arch: Arch, block_n: int) -> int:
    """Splits of a KV head's slots: two programs for each processor, no split shorter than one step, at most 64."""
    wanted = -(-2 * arch.units // shapes.heads)
    return max(1, min(wanted, -(-shapes.slots // block_n), 64))


def precision_for(shapes: Shapes, arch: Arch) -> str:
    """float32 on CUDA takes tensor cores three times; plain multiply-adds spill. AMD has float32 matrix cores."""
    return "tf32x3" if shapes.dtype == "float32" and arch.backend == "cuda" else "ieee"


def default_tile(kernel: str, shapes: Shapes, arch: Arch) -> Tile:
    """The tile where the store has none: it compiles without spills and fits shared memory on every ARCH."""
    tile = _default_tile(kernel, shapes, arch)
    return dataclasses.replace(tile, precision=precision_for(shapes, arch))


def _default_tile(kernel: str, shapes: Shapes, arch: Arch) -> Tile:
    wide, small = block_of(max(shapes.dim, shapes.value_dim)) * shapes.itemsize // 2, arch.shared <= 64 * 1024
    if kernel.startswith("importance"):
        if shapes.itemsize == 4:  # each operand is split in three: anything larger spills
            return Tile(64, 32 if wide <= 128 else 16, warps=8, stages=2)
        block_n = 128 if wide <= 128 else 64
        # Four warps spill a few registers at D = 256 on sm_100, and eight do on gfx942.
        return Tile(block_n, 32 if wide > 128 or small else 64, warps=8 if wide > 128 and not small else 4, stages=2)
    if kernel == "gather":
        return Tile(32 if wide <= 128 else 16, warps=4, stages=1)
    block_n = 64 if wide <= 128 and not small else 32
    if wide > 256:
        block_n = 16
    warps = 8 if wide > 256 else 4
    return Tile(block_n, splits=splits_for(shapes, arch, block_n), warps=warps, stages=2 if small or wide > 256 else 3)


def candidate_tiles(kernel: str, shapes: Shapes, arch: Arch) -> Iterator[Tile]:
    """Every tile that the tuner considers, the default first; what cannot fit is the cost model's to drop."""
    default = default_tile(kernel, shapes, arch)
    yield default
    if kernel.startswith("importance"):
        choices = [
            Tile(n, m, warps=w, stages=s)
            for n, m, w, s in itertools.product((64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3))
        ]
    elif kernel == "gather":
        choices = [Tile(n, warps=w, stages=1) for n, w in itertools.product((8, 16, 32, 64, 128), (2, 4, 8))]
    else:
        most = splits_for(shapes, arch, 16)
        counts = sorted({max(1, most // part) for part in (1, 2, 4)})
        choices = [
            Tile(n, splits=p, warps=w, stages=s)
            for n, p, w, s in itertools.product((16, 32, 64, 128), counts, (2, 4, 8), (2, 3, 4))
        ]
    choices = [dataclasses.replace(tile, precision=default.precision) for tile in choices]
    yield from (tile for tile in choices if tile != default)
