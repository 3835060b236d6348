"""The kernels of `importance`: with a pass of its own for the rows' log-sum-exp, and where that is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specpass.kernels.archs import KIB, Arch
from specpass.kernels.importance import case
from specpass.kernels.importance.plan import column_launch, lse_launches
from specpass.kernels.importance.reference import importance
from specpass.kernels.launch import Launch, rows_contiguous, start
from specpass.kernels.shapes import Shapes, block_of, constant, dtype_of, power_of_two
from specpass.kernels.spec import Kernel, Operands
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost


class Importance(Kernel):
    """K is read twice: for each row's log-sum-exp, then for the scores."""

    name = "importance"
    operator = "importance"
    reference = staticmethod(importance)
    work = "columns"
    variants = ({"reduce": "sum", "weighted": True}, {"reduce": "mean"}, {"softcap": 30.0}, {"sinks": True})

    def applies(self, operands: Operands) -> bool:
        return operands["lse"] is None

    def refuse_layout(self, operands: Operands) -> str | None:
        return None if operands.get("bias") is None else "a bias of the keys (ALiBi)"

    def refuse(self, shapes: Shapes) -> str | None:
        refused = super().refuse(shapes)
        if refused is not None:
            return refused
        if shapes.dtype == "float32" and shapes.dim > 128:
            return (
                f"float32 with head dimension {shapes.dim}: no tile of three-product tensor-core dots is free of spills"
            )
        if shapes.members > 16384:
            return f"{shapes.members} query rows of a KV head: at most 16384"
        return None

    def shapes_of(self, operands: Operands) -> Shapes:
        query, key = operands["query"], operands["key"]
        batch, kv_heads, columns, dim = key.shape
        return Shapes(
            dtype_of(key),
            constant(batch),
            kv_heads,
            query.shape[1] // kv_heads,
            dim,
            dim,
            rows=constant(query.shape[2]),
            window=operands["window"],
            columns=power_of_two(constant(columns)),
            reduce=operands["reduce"],
            weighted=operands["weights"] is not None,
            softcap=operands["softcap"],
            # a log-sum-exp that is given has them in it
            sinks=operands["sinks"] is not None and operands["lse"] is None,
        )

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        wide, small = block_of(shapes.dim) * shapes.itemsize // 2, arch.shared <= 64 * KIB
        if shapes.itemsize == 4:  # each operand is split in three: anything larger spills
            return Tile(64, 32 if wide <= 128 else 16, warps=8, stages=2)
        block_n = 128 if wide <= 128 else 64
        # Four warps spill a few registers at D = 256 on sm_100, and eight do on gfx942.
        return Tile(block_n, 32 if wide > 128 or small else 64, warps=8 if wide > 128 and not small else 4, stages=2)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        sizes = itertools.product((64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3))
        return (Tile(n, m, warps=warps, stages=stages) for n, m, warps, stages in sizes)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.importance.cost import IMPORTANCE

        return IMPORTANCE

    @property
    def least(self) -> Cost:
        """One pass over K: the second is the kernel's own cost."""
        from specpass.kernels.importance.cost import GIVEN_LSE

        return GIVEN_LSE

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        return (*lse_launches(shapes, tile), column_launch(shapes, tile))

    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Tensor:
        """Scores [B, K, T] float32."""
        query, rows, lengths = (operands[name].contiguous() for name in ("query", "rows", "lengths"))
        key, lse, weights = rows_contiguous(operands["key"]), operands["lse"], operands["weights"]
        columns, tiles = key.shape[2], -(-key.shape[2] // tile.block_n)
        sizes = (columns, *key.stride()[:3], operands["scale"])
        if lse is None:
            partial = key.new_empty(shapes.heads, tiles, shapes.members, dtype=torch.float32)
            lse = key.new_empty(shapes.heads, shapes.members, dtype=torch.float32)
            start(self.code, plan[0], (tiles, shapes.heads), query, key, rows, partial, *sizes)
            steps = -(-shapes.members // plan[1].constants["BLOCK_S"])
            sinks = lse if operands["sinks"] is None else operands["sinks"].float()
            start(self.code, plan[1], (steps, shapes.heads), partial, rows, sinks, lse, tiles)
        lse = lse.contiguous()
        weights = lse if weights is None else weights.contiguous()
        scores = key.new_empty(*key.shape[:3], dtype=torch.float32)
        grid = (tiles, shapes.heads)
        start(self.code, plan[-1], grid, query, key, rows, lengths, lse, weights, scores, *sizes)
        return scores

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error(operands, found)


class ImportanceGivenLse(Importance):
    """lse [B, H, R] float32 is each query row's natural log-sum-exp over the columns that it sees, as the attention
    pass returned it: K is read once."""

    name = "importance_given_lse"

    def applies(self, operands: Operands) -> bool:
        return operands["lse"] is not None

    @property
    def cost(self) -> Cost:
        return self.least

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        return (column_launch(shapes, tile),)

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        operands = super().make(shapes, device, seed)
        return operands | {"lse": case.log_sum_exp(operands).float()}


KERNELS = (Importance(), ImportanceGivenLse())
