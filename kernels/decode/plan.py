"""The launches of decode attention, as data."""

from __future__ import annotations

from specpass.bits import GROUP, Layout
from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes, block_of, power_of_two
from specpass.kernels.tiles import Tile


def cut(shapes: Shapes, tile: Tile) -> tuple[int, int]:
    """Splits of a KV head's slots, and the steps of block_n slots that each of them takes."""
    steps = -(-shapes.slots // (tile.splits * tile.block_n))
    return -(-shapes.slots // (steps * tile.block_n)), steps


def launches(shapes: Shapes, tile: Tile, write: bool, returns_lse: bool = False) -> tuple[Launch, ...]:
    """One, or two where splits are combined.

    Args: write: the new token's K/V is written, and `lengths` advances. returns_lse: the second launch, which there
    always is then, writes the log-sum-exp.

    Nothing here but the power of two that holds all splits follows the number of slots: it differs from prompt to
    prompt where a draft keeps its whole prompt, and a launch is compiled for its constants.
    """
    x = f"*{shapes.triton_dtype}"
    splits, _ = cut(shapes, tile)
    arguments = {
        "query": x,
        "keys": x,
        "values": x,
        "lengths": "*i64",
        "offsets": "*i64",
        "key": x,
        "value": x,
        "sinks": "*fp32",
        "out": x,
        "partial": "*fp32",
        "lse": "*fp32",
        "stride": "i32",
        "steps": "i32",
        "scale": "fp32",
    }
    constants = {
        "K": shapes.kv_heads,
        "G": shapes.group,
        "D": shapes.dim,
        "DV": shapes.value_dim,
        "RAGGED": int(shapes.ragged),
        "SPLIT_UP": int(splits > 1 or returns_lse),
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
    attend = Launch("attend_slots", arguments, constants, tile.warps, tile.stages, True, ("stride", "steps"))
    if splits == 1 and not returns_lse:
        return (attend,)
    return attend, combination(shapes, splits, write, returns_lse)


def combination(shapes: Shapes, splits: int, write: bool = False, returns_lse: bool = False) -> Launch:
    """The launch that makes one result of all splits."""
    x = f"*{shapes.triton_dtype}"
    combine = {
        "G": shapes.group,
        "DV": shapes.value_dim,
        "BLOCK_S": power_of_two(splits),
        "BLOCK_DV": block_of(shapes.value_dim),
        "WRITE": int(write),
        "LSE": int(returns_lse),
    }
    read = {"partial": "*fp32", "lse": "*fp32", "lengths": "*i64", "out": x, "natural": "*fp32", "splits": "i32"}
    return Launch("combine_splits", read, combine, 4, 1, unaligned=("splits",))


def code_launches(shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    """As `launches`, over a prompt in `shapes.bits` and what stands behind it."""
    x = f"*{shapes.triton_dtype}"
    splits, _ = cut(shapes, tile)
    layout = Layout(shapes.bits, shapes.dim, shapes.value_dim, shapes.itemsize)
    names = ("query", "codes", "numbers", "counts", "keys", "values", "lengths", "sinks", "out", "partial", "lse")
    kinds = {"codes": "*u8", "counts": "*i64", "lengths": "*i64", "sinks": "*fp32", "partial": "*fp32", "lse": "*fp32"}
    sizes = ("stride", "blocks", "steps")
    arguments = {name: kinds.get(name, x) for name in names} | dict.fromkeys(sizes, "i32") | {"scale": "fp32"}
    starts = {name: field.start for name, field in layout.fields.items()}
    constants = {
        "K": shapes.kv_heads,
        "G": shapes.group,
        "D": shapes.dim,
        "DV": shapes.value_dim,
        "BITS": shapes.bits,
        "GROUP": GROUP,
        "VALUE_GROUP": layout.value_group,
        "BLOCK_BYTES": layout.block_bytes,
        "BLOCK_NUMBERS": layout.block_bytes // shapes.itemsize,
        "KEY_CODES": starts["key_codes"],
        "VALUE_CODES": starts["value_codes"],
        **{
            name.upper(): starts[name] // shapes.itemsize
            for name in ("key_scale", "key_zero", "value_scale", "value_zero")
        },
        "SPLIT_UP": int(splits > 1),
        "BLOCK_G": 16,
        "BLOCK_N": tile.block_n,
        "BLOCK_W": block_of(shapes.dim * shapes.bits // 8),
        "BLOCK_WV": block_of(shapes.value_dim * shapes.bits // 8),
        "SOFTCAP": shapes.softcap,
        "SINKS": int(shapes.sinks),
        "UPCAST": 0,
        "PRECISION": tile.precision,
    }
    attend = Launch("attend_codes", arguments, constants, tile.warps, tile.stages, True, sizes)
    return (attend,) if splits == 1 else (attend, combination(shapes, splits))
