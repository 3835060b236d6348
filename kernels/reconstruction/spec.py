"""The kernel of `reconstruction`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specpass.kernels.archs import KIB, Arch
from specpass.kernels.launch import Launch, rows_contiguous, start
from specpass.kernels.reconstruction import case
from specpass.kernels.reconstruction.plan import launches
from specpass.kernels.reconstruction.reference import reconstruction
from specpass.kernels.shapes import Shapes, constant, dtype_of, power_of_two
from specpass.kernels.spec import FOLDER, Kernel, Operands
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost


class Reconstruction(Kernel):
    """K and V are read twice: for the rows' outputs, then for the scores."""

    name = "reconstruction"
    operator = "reconstruction"
    reference = staticmethod(reconstruction)
    work = "columns"
    variants = ({"reduce": "mean"}, {"softcap": 30.0}, {"sinks": True})

    def refuse_layout(self, operands: Operands) -> str | None:
        if operands.get("bias") is not None:
            return "a bias of the keys (ALiBi)"
        return "futures that do not see one another" if operands.get("lookahead") else None

    def refuse(self, shapes: Shapes) -> str | None:
        refused = super().refuse(shapes)
        if refused is not None:
            return refused
        dim, most = max(shapes.dim, shapes.value_dim), 64 if shapes.dtype == "float32" else 128
        if dim > most:
            return f"{shapes.dtype} with head dimension {dim}: no tile is free of spills on every architecture"
        if shapes.members > 16384:
            return f"{shapes.members} query rows of a KV head: at most 16384"
        return None

    def shapes_of(self, operands: Operands) -> Shapes:
        query, key, value = (operands[name] for name in ("query", "key", "value"))
        batch, kv_heads, columns, dim = key.shape
        return Shapes(
            dtype_of(key),
            constant(batch),
            kv_heads,
            query.shape[1] // kv_heads,
            dim,
            value.shape[3],
            rows=constant(query.shape[2]),
            window=operands["window"],
            columns=power_of_two(constant(columns)),
            reduce=operands["reduce"],
            softcap=operands["softcap"],
            sinks=operands["sinks"] is not None,
        )

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        if shapes.itemsize == 4:  # each operand is split in three: anything larger spills
            return Tile(32, 16, warps=8, stages=1)
        # Before sm_90, and on sm_120 and AMD, operands of dots lie in registers.
        return Tile(64, 16 if arch.shared <= 163 * KIB else 32, warps=8, stages=1)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        sizes = itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3))
        return (Tile(n, m, warps=warps, stages=stages) for n, m, warps, stages in sizes)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.reconstruction.cost import RECONSTRUCTION

        return RECONSTRUCTION

    @property
    def sources(self) -> tuple[Path, ...]:
        return (*super().sources, FOLDER / "importance" / "jit.py")

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        return launches(shapes, tile)

    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Tensor:
        """Returns scores [B, K, T] float32."""
        query, rows, lengths = (operands[name].contiguous() for name in ("query", "rows", "lengths"))
        key, value = (rows_contiguous(operands[name]) for name in ("key", "value"))
        columns = key.shape[2]
        sizes = (columns, *key.stride()[:3], *value.stride()[:3], operands["scale"])
        lse = key.new_empty(shapes.heads, shapes.members, dtype=torch.float32)
        out = key.new_empty(shapes.heads, shapes.members, shapes.value_dim, dtype=torch.float32)
        sinks = lse if operands["sinks"] is None else operands["sinks"].float()
        grid = (-(-shapes.members // tile.block_m), shapes.heads)
        start(self.code, plan[0], grid, query, key, value, rows, sinks, lse, out, *sizes)
        largest = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).amax(-1)
        scores = key.new_empty(*key.shape[:3], dtype=torch.float32)
        grid = (-(-columns // tile.block_n), shapes.heads)
        start(self.code, plan[1], grid, query, key, value, rows, lengths, lse, out, largest, scores, *sizes)
        return scores

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error(operands, found, shapes)


KERNELS = (Reconstruction(),)
