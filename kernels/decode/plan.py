"""The launches of decode attention, as data."""

from __future__ import annotations

from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes, block_of, power_of_two
from specpass.kernels.tiles import Tile


def launches(shapes: Shapes, tile: Tile, write: bool) -> tuple[Launch, ...]:
    """One, or two where splits are combined; `write`: the new token's K/V is written, and `lengths` advances."""
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
