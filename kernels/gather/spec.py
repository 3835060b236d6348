"""The kernel of `gather_kv`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specpass.kernels.archs import Arch
from specpass.kernels.gather import case
from specpass.kernels.gather.reference import gather_kv
from specpass.kernels.launch import Launch, rows_contiguous, start
from specpass.kernels.shapes import Shapes, block_of, constant, dtype_of, power_of_two
from specpass.kernels.spec import Kernel, Operands
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost


class Gather(Kernel):
    """K and V, and the count of slots in use, in one launch."""

    name = "gather"
    operator = "gather_kv"
    reference = staticmethod(gather_kv)

    def shapes_of(self, operands: Operands) -> Shapes:
        key, value = operands["key"], operands["value"]
        batch, kv_heads, _, dim = key.shape
        budget, room = operands["positions"].shape[2], operands["room"]
        return Shapes(
            dtype_of(key),
            constant(batch),
            kv_heads,
            1,
            dim,
            value.shape[3],
            budget=constant(budget),
            room=constant(room),
        )

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        wide = block_of(max(shapes.dim, shapes.value_dim)) * shapes.itemsize // 2
        return Tile(32 if wide <= 128 else 16, warps=4, stages=1)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        sizes = itertools.product((8, 16, 32, 64, 128), (2, 4, 8))
        return (Tile(n, warps=warps, stages=1) for n, warps in sizes)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.gather.cost import GATHER

        return GATHER

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        x = f"*{shapes.triton_dtype}"
        strides = {f"{of}_{axis}": "i64" for of in ("key", "value") for axis in "bkt"}
        arguments = {"key": x, "value": x, "positions": "*i64", "keys": x, "values": x, "lengths": "*i64", **strides}
        constants = {
            "K": shapes.kv_heads,
            "C": shapes.budget,
            "N": shapes.room,
            "D": shapes.dim,
            "DV": shapes.value_dim,
            "BLOCK_P": tile.block_n,
            "BLOCK_C": min(1024, power_of_two(shapes.budget)),
            "BLOCK_D": block_of(shapes.dim),
            "BLOCK_DV": block_of(shapes.value_dim),
        }
        return (Launch("gather_slots", arguments, constants, tile.warps, tile.stages),)

    def run(
        self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """keys [B, K * (C + N), D], values [B, K * (C + N), Dv], lengths [B, K]."""
        key, value = (rows_contiguous(operands[name]) for name in ("key", "value"))
        positions = operands["positions"].contiguous()
        keys, values = (s.new_empty(shapes.batch, shapes.kv_heads * shapes.slots, s.shape[3]) for s in (key, value))
        lengths = positions.new_empty(shapes.batch, shapes.kv_heads)
        grid = (-(-shapes.slots // tile.block_n), shapes.heads)
        strides = (*key.stride()[:3], *value.stride()[:3])
        start(self.code, plan[0], grid, key, value, positions, keys, values, lengths, *strides)
        return keys, values, lengths

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error(operands, found)


KERNELS = (Gather(),)
