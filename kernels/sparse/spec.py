"""The kernel of `prefill_attention_sparse`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specpass.kernels.archs import KIB, Arch
from specpass.kernels.launch import Launch, rows_contiguous, start
from specpass.kernels.shapes import Shapes, block_of, constant, dtype_of, power_of_two
from specpass.kernels.sparse import case
from specpass.kernels.sparse.reference import prefill_attention_sparse
from specpass.kernels.spec import Kernel, Operands
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost

GROUP = 16  # query heads of a KV head at most: the smallest tile holds one position of them


class SparsePrefill(Kernel):
    """Chosen columns are read by index, and the rows that read all columns by the same launch."""

    name = "sparse_prefill"
    operator = "prefill_attention_sparse"
    reference = staticmethod(prefill_attention_sparse)
    work = "columns"

    def refuse_layout(self, operands: Operands) -> str | None:
        columns, chosen = operands["query"].shape[2], operands["columns"].shape[2]
        if isinstance(columns, int) and columns <= chosen + operands["recent"]:
            return "a prompt that is read whole: torch's flash attention"
        return None

    def refuse(self, shapes: Shapes) -> str | None:
        refused = super().refuse(shapes)
        if refused is not None:
            return refused
        if shapes.dtype == "float32" and max(shapes.dim, shapes.value_dim) > 128:
            return (
                f"float32 with head dimension {max(shapes.dim, shapes.value_dim)}: no tile of three-product "
                "tensor-core dots is free of spills"
            )
        if shapes.group > GROUP:
            return f"group of {shapes.group} query heads: at most {GROUP}"
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
            rows=operands["window"] + operands["ahead"],
            window=operands["window"],
            budget=constant(operands["columns"].shape[2]),
            columns=power_of_two(constant(columns)),
        )

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        dim = max(shapes.dim, shapes.value_dim)
        wide = block_of(dim) * shapes.itemsize // 2
        amd = arch.backend == "hip"
        if shapes.itemsize == 4:  # each operand is split in three: anything larger spills
            return Tile(16, 16, stages=1) if wide > 128 else Tile(32, 32, warps=8, stages=2)
        if wide > 128:
            return Tile(16 if amd else 32, 64, warps=8, stages=2)
        if amd:
            return Tile(32, 128, warps=8, stages=1)
        # Before sm_90, and on sm_120, operands of dots lie in registers, and masks of padded dimensions besides.
        if arch.shared <= 163 * KIB and dim != block_of(dim):
            return Tile(16, 128, warps=8, stages=3)
        return Tile(64, 128, warps=8, stages=3)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        sizes = itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (2, 3, 4))
        return (Tile(n, m, warps=warps, stages=stages) for n, m, warps, stages in sizes)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.sparse.cost import SPARSE

        return SPARSE

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        x = f"*{shapes.triton_dtype}"
        sizes = ("T", "window", "ahead", "recent")
        strides = (*(f"query_{axis}" for axis in "bht"), *(f"{of}_{axis}" for of in ("key", "value") for axis in "bkt"))
        arguments = {"query": x, "key": x, "value": x, "columns": "*i64", "lengths": "*i64", "out": x}
        arguments |= dict.fromkeys(sizes, "i32") | dict.fromkeys(strides, "i64") | {"scale": "fp32"}
        constants = {
            "K": shapes.kv_heads,
            "G": shapes.group,
            "V": shapes.budget,
            "D": shapes.dim,
            "DV": shapes.value_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": min(1024, power_of_two(shapes.budget)),
            "BLOCK_D": block_of(shapes.dim),
            "BLOCK_DV": block_of(shapes.value_dim),
            "UPCAST": 0,
            "PRECISION": tile.precision,
        }
        return (Launch("attend_sparsely", arguments, constants, tile.warps, tile.stages, True, sizes),)

    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Tensor:
        """[B, H, T, Dv], lying in memory as [B, T, H, Dv]."""
        states = [rows_contiguous(operands[name]) for name in ("query", "key", "value")]
        columns, lengths = (operands[name].contiguous() for name in ("columns", "lengths"))
        batch, heads, count = states[0].shape[:3]
        out = states[0].new_empty(batch, count, heads, shapes.value_dim)
        grid = (-(-count // (tile.block_m // shapes.group)) * batch * shapes.kv_heads,)
        sizes = (count, *(operands[name] for name in ("window", "ahead", "recent")))
        strides = (step for each in states for step in each.stride()[:3])
        start(self.code, plan[0], grid, *states, columns, lengths, out, *sizes, *strides, operands["scale"])
        return out.transpose(1, 2)

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error(operands, found, shapes)


KERNELS = (SparsePrefill(),)
