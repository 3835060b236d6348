"""The launches of reconstruction, as data."""

from __future__ import annotations

from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes, block_of, power_of_two
from specpass.kernels.tiles import Tile


def launches(shapes: Shapes, tile: Tile) -> tuple[Launch, Launch]:
    x = f"*{shapes.triton_dtype}"
    strides = dict.fromkeys((f"{of}_{axis}" for of in ("key", "value") for axis in "bkt"), "i64")
    states, sizes = {"query": x, "key": x, "value": x, "rows": "*i64"}, {"T": "i32", **strides, "scale": "fp32"}
    made = {"lse": "*fp32", "out": "*fp32"}
    constants = {
        "K": shapes.kv_heads,
        "G": shapes.group,
        "R": shapes.rows,
        "D": shapes.dim,
        "DV": shapes.value_dim,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": block_of(shapes.dim),
        "BLOCK_DV": block_of(shapes.value_dim),
        "BLOCK_R": power_of_two(shapes.rows),
        "SOFTCAP": shapes.softcap,
        "UPCAST": 0,
        "PRECISION": tile.precision,
    }
    rows, columns = {"SINKS": int(shapes.sinks)}, {"W": shapes.window, "REDUCE": shapes.reduce}
    given = {**states, "lengths": "*i64", **made, "largest": "*fp32", "scores": "*fp32", **sizes}
    cut = (tile.warps, tile.stages, True, ("T",))
    return (
        Launch("row_outputs", {**states, "sinks": "*fp32", **made, **sizes}, constants | rows, *cut),
        Launch("column_moves", given, constants | columns, *cut),
    )
