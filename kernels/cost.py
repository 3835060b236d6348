"""Closed forms of what a kernel moves, computes and holds, in sympy: they rank tiles and rule out what cannot fit.

Symbols as in Shapes, T columns, M = G * R and P = C + N; e bytes of an element; n, m a tile's block_n and block_m,
s its stages, p its splits; Dp and Vp the head dimensions rounded up to a power of two. Bytes and FLOPs are of one call,
all heads together. Each kernel's forms are in its folder.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import sympy

from specpass.kernels.archs import Arch
from specpass.kernels.shapes import Shapes, block_of
from specpass.kernels.spec import Kernel
from specpass.kernels.tiles import Tile

B, K, G, R, T, C, N, D, V, e = sympy.symbols("B K G R T C N D V e", positive=True, integer=True)
n, m, s, p, Dp, Vp = sympy.symbols("n m s p Dp Vp", positive=True, integer=True)
M, P = G * R, C + N
NOTHING = sympy.Integer(0)
LAUNCH_SECONDS = 3e-6  # of one launch behind another; decides between few splits and a second stage
CACHE_FACTOR = 3  # second-level cache over memory bandwidth, for operands that every tile reads again


@dataclasses.dataclass(frozen=True)
class Cost:
    """Closed forms of one kernel.

    Args:
        bytes: to and from memory. reread: from the second-level cache. flops: on tensor cores.
        shared: least bytes of shared memory of a program. accumulators: float32 values that a program holds.
        programs: of the largest launch. launches: in a row.
    """

    bytes: Any
    reread: Any
    flops: Any
    shared: Any
    accumulators: Any
    programs: Any
    launches: Any


_SYMBOLS = (B, K, G, R, T, C, N, D, V, e, n, m, s, p, Dp, Vp)


@functools.cache
def _compiled(form: Any) -> Any:
    return sympy.lambdify(_SYMBOLS, form, "math")


def evaluate(form: Any, shapes: Shapes, tile: Tile) -> float:
    """The value of one closed form, e.g. evaluate(kernel.cost.bytes, shapes, tile)."""
    values = (
        shapes.batch,
        shapes.kv_heads,
        shapes.group,
        shapes.rows,
        shapes.columns,
        shapes.budget,
        shapes.room,
        shapes.dim,
        shapes.value_dim,
        shapes.itemsize,
        tile.block_n,
        tile.block_m,
        tile.stages,
        tile.splits,
        block_of(shapes.dim),
        block_of(shapes.value_dim),
    )
    return float(_compiled(form)(*values))


def rule_out(kernel: Kernel, shapes: Shapes, tile: Tile, arch: Arch) -> str | None:
    """Why no compiler could make this tile work on this architecture, or None."""
    shared = evaluate(kernel.cost.shared, shapes, tile)
    if shared > arch.shared:
        return f"shared memory: at least {shared:.0f} of {arch.shared} bytes"
    threads = tile.warps * arch.warp
    registers = evaluate(kernel.cost.accumulators, shapes, tile) / threads
    if registers > 128:
        return f"registers: {registers:.0f} accumulators a thread"
    if threads > arch.threads // 2:
        return "occupancy: fewer than two programs of a processor"
    return kernel.rule_out(shapes, tile, arch)


def seconds(kernel: Kernel, shapes: Shapes, tile: Tile, arch: Arch) -> float:
    """Predicted time of a call: the slowest of memory, cache and tensor cores, on the processors that have work."""
    cost, value = kernel.cost, functools.partial(evaluate, shapes=shapes, tile=tile)
    shared, programs = value(cost.shared), value(cost.programs)
    resident = max(1, min(8, int(arch.shared_unit // max(shared, 1)), arch.threads // (tile.warps * arch.warp)))
    filled = min(1.0, programs * tile.warps / (arch.units * 8))  # eight warps of a processor keep its memory busy
    hidden = min(1.0, (resident * tile.warps * tile.stages) / 16)  # what is in flight hides latency
    slowest = max(
        value(cost.bytes) / arch.bandwidth,
        value(cost.reread) / (CACHE_FACTOR * arch.bandwidth),
        value(cost.flops) / arch.flops,
    )
    return slowest / (filled * hidden) + value(cost.launches) * LAUNCH_SECONDS


def shortlist(kernel: Kernel, shapes: Shapes, arch: Arch, count: int) -> list[Tile]:
    """The `count` tiles that the model likes best, best first, the default always among them.

    Equal predictions keep the order of the candidates, so the default wins where the model sees no difference.
    """
    candidates = kernel.candidate_tiles(shapes, arch)
    tiles = [tile for tile in candidates if rule_out(kernel, shapes, tile, arch) is None]
    default = kernel.default_tile(shapes, arch)
    ranked = sorted(tiles, key=lambda tile: seconds(kernel, shapes, tile, arch))[:count]
    return ranked if default in ranked else [*ranked[: count - 1], default]
