"""Closed forms of what a kernel moves, computes and holds, in sympy: they rank tiles and rule out what cannot fit.

Symbols as in reference.py, and: e bytes of an element; n, m a tile's block_n and block_m, s its stages, p its splits;
Dp and Vp the head dimensions rounded up to a power of two. Bytes and FLOPs are of one call, all heads together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import sympy

from specpass.kernels.archs import Arch
from specpass.kernels.shapes import Shapes, block_of
from specpass.kernels.tiles import Tile, candidate_tiles

B, K, G, R, T, C, N, D, V, e = sympy.symbols("B K G R T C N D V e", positive=True, integer=True)
n, m, s, p, Dp, Vp = sympy.symbols("n m s p Dp Vp", positive=True, integer=True)
M, P = G * R, C + N
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
    launches: int


_SCORE_TILE = n * Dp * e + (s - 2) * m * Dp * e
_PASS = {
    "reread": B * K * T / n * M * D * e,
    "flops": 2 * B * K * M * T * Dp,
    "accumulators": n * m,
    "programs": B * K * sympy.ceiling(T / n),
}
_OUTER = B * K * M * (D * e + 8) + B * K * T * 4
_DECODE = {
    "bytes": B * K * (P + G) * (D + V) * e + sympy.Min(1, p - 1) * 2 * B * K * p * G * (V + 1) * 4,
    "reread": sympy.Integer(0),
    "flops": 2 * B * K * 16 * P * (Dp + Vp),
    "shared": (s - 1) * n * (Dp + Vp) * e,
    "accumulators": 16 * (n + Vp),
    "programs": B * K * p,
}

COSTS: dict[str, Cost] = {
    "importance": Cost(
        2 * B * K * T * D * e + _OUTER + 2 * B * K * T / n * M * 4,
        2 * _PASS["reread"],
        2 * _PASS["flops"],
        _SCORE_TILE,
        n * m,
        _PASS["programs"],
        3,
    ),
    "importance_given_lse": Cost(
        B * K * T * D * e + _OUTER, _PASS["reread"], _PASS["flops"], _SCORE_TILE, n * m, _PASS["programs"], 1
    ),
    "gather": Cost(
        B * K * ((C + P) * (D + V) * e + C * 8),
        sympy.Integer(0),
        sympy.Integer(0),
        sympy.Integer(0),
        n * (Dp + Vp) * e / 4,
        B * K * sympy.ceiling(P / n),
        1,
    ),
    "decode": Cost(**_DECODE, launches=2),
    "decode_append": Cost(**_DECODE, launches=2),
}

_SYMBOLS = (B, K, G, R, T, C, N, D, V, e, n, m, s, p, Dp, Vp)


@functools.cache
def _compiled(kernel: str, field: str) -> Any:
    return sympy.lambdify(_SYMBOLS, getattr(COSTS[kernel], field), "math")


def evaluate(kernel: str, field: str, shapes: Shapes, tile: Tile) -> float:
    """The value of one closed form, e.g. evaluate("decode", "bytes", shapes, tile)."""
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
    return float(_compiled(kernel, field)(*values))


def rule_out(kernel: str, shapes: Shapes, tile: Tile, arch: Arch) -> str | None:
    """Why no compiler could make this tile work on this architecture, or None."""
    shared = evaluate(kernel, "shared", shapes, tile)
    if shared > arch.shared:
        return f"shared memory: at least {shared:.0f} of {arch.shared} bytes"
    threads = tile.warps * arch.warp
    registers = evaluate(kernel, "accumulators", shapes, tile) / threads
    if registers > 128:
        return f"registers: {registers:.0f} accumulators a thread"
    if kernel.startswith("decode") and tile.block_n * block_of(shapes.dim) * shapes.itemsize < 32 * threads:
        return "loads: less than two of 16 bytes a thread"
    if threads > arch.threads // 2:
        return "occupancy: fewer than two programs of a processor"
    return None


def seconds(kernel: str, shapes: Shapes, tile: Tile, arch: Arch) -> float:
    """Predicted time of a call: the slowest of memory, cache and tensor cores, on the processors that have work."""
    cost = functools.partial(evaluate, kernel, shapes=shapes, tile=tile)
    shared, programs = cost("shared"), cost("programs")
    resident = max(1, min(8, int(arch.shared_unit // max(shared, 1)), arch.threads // (tile.warps * arch.warp)))
    filled = min(1.0, programs * tile.warps / (arch.units * 8))  # eight warps of a processor keep its memory busy
    hidden = min(1.0, (resident * tile.warps * tile.stages) / 16)  # what is in flight hides latency
    slowest = max(
        cost("bytes") / arch.bandwidth, cost("reread") / (CACHE_FACTOR * arch.bandwidth), cost("flops") / arch.flops
    )
    launches = 1 if kernel.startswith("decode") and tile.splits == 1 else COSTS[kernel].launches
    return slowest / (filled * hidden) + launches * LAUNCH_SECONDS


def shortlist(kernel: str, shapes: Shapes, arch: Arch, count: int) -> list[Tile]:
    """The `count` tiles that the model likes best, best first, the default always among them.

    Equal predictions keep the order of the candidates, so the default wins where the model sees no difference.
    """
    tiles = [tile for tile in candidate_tiles(kernel, shapes, arch) if rule_out(kernel, shapes, tile, arch) is None]
    default = next(iter(candidate_tiles(kernel, shapes, arch)))
    ranked = sorted(tiles, key=lambda tile: seconds(kernel, shapes, tile, arch))[:count]
    return ranked if default in ranked else [*ranked[: count - 1], default]
