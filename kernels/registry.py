"""Every kernel by name: its launches for given shapes and a tile, as data that the launcher, the ahead-of-time
compiler, the emitter and the tuner share. Nothing here imports Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specpass.kernels.shapes import Shapes, block_of, power_of_two
from specpass.kernels.tiles import Tile

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        function: the jit function's name. arguments: its run-time arguments and their Triton types, in order.
        constants: its constexpr arguments. dot: whether it should use tensor cores (with 16-bit operands).
        unaligned: integer arguments that need not be multiples of 16.
    """

    function: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    dot: bool = False
    unaligned: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: `module` under specpass.kernels holds its functions, `reference` names its plain aten formula."""

    name: str
    module: str
    reference: str
    plan: Callable[[Shapes, Tile], tuple[Launch, ...]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the kernel's source and with how it is launched."""
        files = (f"{self.module}.py", "logits.py", "registry.py", "launch.py", "shapes.py")
        return hashlib.sha256(b"\0".join((FOLDER / name).read_bytes() for name in files)).hexdigest()[:16]


_STRIDES = {"T": "i32", "stride_b": "i64", "stride_k": "i64", "stride_t": "i64", "scale": "fp32"}


def _column_launch(shapes: Shapes, tile: Tile) -> Launch:
    x = f"*{shapes.triton_dtype}"
    arguments = {
        "query": x,
        "key": x,
        "rows": "*i64",
        "lengths": "*i64",
        "lse": "*fp32",
        "weights": "*fp32",
        "scores": "*fp32",
        **_STRIDES,
    }
    constants = {
        **_score_constants(shapes, tile),
        "W": shapes.window,
        "REDUCE": shapes.reduce,
        "WEIGHTED": int(shapes.weighted),
    }
    return Launch("column_scores", arguments, constants, tile.warps, tile.stages, True, ("T",))


def _score_constants(shapes: Shapes, tile: Tile) -> dict[str, Any]:
    return {
        "K": shapes.kv_heads,
        "G": shapes.group,
        "R": shapes.rows,
        "D": shapes.dim,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": block_of(shapes.dim),
        "BLOCK_R": power_of_two(shapes.rows),
        "SOFTCAP": shapes.softcap,
        "UPCAST": 0,
        "PRECISION": tile.precision,
    }


@functools.lru_cache(maxsize=256)
def plan_importance(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    x = f"*{shapes.triton_dtype}"
    arguments = {"query": x, "key": x, "rows": "*i64", "partial": "*fp32", **_STRIDES}
    constants = _score_constants(shapes, tile)
    combine = {name: constants[name] for name in ("K", "G", "R", "BLOCK_N", "BLOCK_R")}
    return (
        Launch("tile_lse", arguments, constants, tile.warps, tile.stages, True, ("T",)),
        Launch(
            "combine_lse",
            {"partial": "*fp32", "rows": "*i64", "sinks": "*fp32", "lse": "*fp32", "tiles": "i32"},
            {**combine, "SINKS": int(shapes.sinks), "BLOCK_S": 16, "BLOCK_T": 64},
            4,
            2,
            unaligned=("tiles",),
        ),
        _column_launch(shapes, tile),
    )


@functools.lru_cache(maxsize=256)
def plan_importance_given_lse(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    return (_column_launch(shapes, tile),)


@functools.lru_cache(maxsize=256)
def plan_gather(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
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


def _plan_decode(shapes: Shapes, tile: Tile, write: bool) -> tuple[Launch, ...]:
    x = f"*{shapes.triton_dtype}"
    step = tile.splits * tile.block_n
    split = -(-shapes.slots // step) * tile.block_n  # a multiple of block_n, so that no slot is read twice
    splits = -(-shapes.slots // split)
    arguments = {
        "query": x,
        "keys": x,
        "values": x,
        "lengths": "*i64",
        "key": x,
        "value": x,
        "sinks": "*fp32",
        "out": x,
        "partial": "*fp32",
        "lse": "*fp32",
        "stride": "i32",
        "scale": "fp32",
    }
    constants = {
        "K": shapes.kv_heads,
        "G": shapes.group,
        "D": shapes.dim,
        "DV": shapes.value_dim,
        "P": shapes.slots,
        "SPLITS": splits,
        "SPLIT": split,
        "BLOCK_G": 16,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_of(shapes.dim),
        "BLOCK_DV": block_of(shapes.value_dim),
        "WRITE": int(write),
        "SOFTCAP": shapes.softcap,
        "SINKS": int(shapes.sinks),
        "UPCAST": 0,
        "PRECISION": tile.precision,
    }
    attend = Launch("attend_slots", arguments, constants, tile.warps, tile.stages, True, ("stride",))
    if splits == 1:
        return (attend,)
    combine = {
        "G": shapes.group,
        "DV": shapes.value_dim,
        "SPLITS": splits,
        "BLOCK_S": power_of_two(splits),
        "BLOCK_DV": block_of(shapes.value_dim),
        "WRITE": int(write),
    }
    return attend, Launch(
        "combine_splits", {"partial": "*fp32", "lse": "*fp32", "lengths": "*i64", "out": x}, combine, 4, 1
    )


@functools.lru_cache(maxsize=256)
def plan_decode(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    return _plan_decode(shapes, tile, write=False)


@functools.lru_cache(maxsize=256)
def plan_decode_append(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    return _plan_decode(shapes, tile, write=True)


REGISTRY: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("importance", "importance", "importance", plan_importance),
        Kernel("importance_given_lse", "importance", "importance", plan_importance_given_lse),
        Kernel("gather", "gather", "gather_kv", plan_gather),
        Kernel("decode", "decode", "attend", plan_decode),
        Kernel("decode_append", "decode", "attend", plan_decode_append),
    )
}
