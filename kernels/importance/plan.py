"""The launches of importance, as data."""

from __future__ import annotations

from typing import Any

from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes, block_of, power_of_two
from specpass.kernels.tiles import Tile

_STRIDES = {"T": "i32", "stride_b": "i64", "stride_k": "i64", "stride_t": "i64", "scale": "fp32"}


def lse_launches(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    """The two that find each row's log-sum-exp."""
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
    )


def column_launch(shapes: Shapes, tile: Tile) -> Launch:
    """The one that reduces a column's probabilities over the rows."""
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
