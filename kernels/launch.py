"""Host side of the kernels: tensors in, tensors out, with the operators' own arguments.

Triton is imported on first use. Shapes as in reference.py. `tile` overrides what the store or the tile table says.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specpass.kernels import store
from specpass.kernels.archs import device_arch, nearest
from specpass.kernels.registry import REGISTRY, Launch
from specpass.kernels.shapes import Shapes, power_of_two
from specpass.kernels.tiles import Tile, default_tile


def code_of(kernel: str) -> ModuleType:
    """The module that holds a kernel's jit functions."""
    return importlib.import_module(f"specpass.kernels.{REGISTRY[kernel].module}")


def find_tile(kernel: str, shapes: Shapes, device: torch.device) -> Tile:
    """The tuned tile for the device's architecture, or the table's."""
    return _find_tile(kernel, shapes, device_arch(device.index or 0) if device.type == "cuda" else None)


@functools.lru_cache(maxsize=1024)
def _find_tile(kernel: str, shapes: Shapes, arch: str | None) -> Tile:
    tuned = None if arch is None else store.lookup(kernel, shapes, arch)
    return tuned or default_tile(kernel, shapes, nearest(arch))


def launch(kernel: str, step: Launch, grid: tuple[int, ...], *args: Any) -> None:
    """Launch one function; `args` are its run-time arguments in order."""
    from triton import knobs

    constants: dict[str, Any] = dict(step.constants)
    first = args[0]
    if "UPCAST" in constants and knobs.runtime.interpret:
        constants["UPCAST"] = first.dtype == torch.bfloat16  # the interpreter's bfloat16 arithmetic is wrong
    function = getattr(code_of(kernel), step.function)
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        function[grid](*args, **constants, num_warps=step.warps, num_stages=step.stages)


def rows_contiguous(states: Tensor) -> Tensor:
    """[B, K, T, D] whose last axis is dense, whatever the other strides are; copied only where it is not."""
    return states if states.stride(3) == 1 or states.shape[3] == 1 else states.contiguous()


def score_shapes(
    query: Tensor,
    key: Tensor,
    window: int,
    reduce: str,
    weighted: bool = False,
    softcap: float = 0.0,
    sinks: bool = False,
) -> Shapes:
    """Shapes of `importance` for query [B, H, R, D] and key [B, K, T, D]."""
    batch, kv_heads, columns, dim = key.shape
    return Shapes(
        str(key.dtype)[6:],
        batch,
        kv_heads,
        query.shape[1] // kv_heads,
        dim,
        dim,
        rows=query.shape[2],
        window=window,
        columns=power_of_two(columns),
        reduce=reduce,
        weighted=weighted,
        softcap=softcap,
        sinks=sinks,
    )


def importance(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Scores [B, K, T] float32, as reference.importance.

    Args: lse [B, H, R] float32: natural log-sum-exp of each query row over the columns that it sees, where the
    attention pass returned it; K is then read once instead of twice.
    """
    sinks = sinks if lse is None else None  # a log-sum-exp that is given has them in it
    shapes = score_shapes(query, key, window, reduce, weights is not None, softcap, sinks is not None)
    kernel = "importance" if lse is None else "importance_given_lse"
    tile = tile or find_tile(kernel, shapes, key.device)
    plan = REGISTRY[kernel].plan(shapes, tile)
    query, key, rows, lengths = query.contiguous(), rows_contiguous(key), rows.contiguous(), lengths.contiguous()
    columns, heads = key.shape[2], shapes.heads
    tiles, sizes = -(-columns // tile.block_n), (columns, *key.stride()[:3], scale)
    if lse is None:
        members = shapes.group * shapes.rows
        partial = key.new_empty(heads, tiles, members, dtype=torch.float32)
        lse = key.new_empty(heads, members, dtype=torch.float32)
        launch(kernel, plan[0], (tiles, heads), query, key, rows, partial, *sizes)
        steps = -(-members // plan[1].constants["BLOCK_S"])
        launch(kernel, plan[1], (steps, heads), partial, rows, lse if sinks is None else sinks.float(), lse, tiles)
    scores, lse = key.new_empty(*key.shape[:3], dtype=torch.float32), lse.contiguous()
    weights = lse if weights is None else weights.contiguous()
    launch(kernel, plan[-1], (tiles, heads), query, key, rows, lengths, lse, weights, scores, *sizes)
    return scores


def gather_shapes(key: Tensor, value: Tensor, budget: int, room: int) -> Shapes:
    """Shapes of `gather_kv` for key [B, K, T, D], value [B, K, T, Dv]."""
    batch, kv_heads, _, dim = key.shape
    return Shapes(str(key.dtype)[6:], batch, kv_heads, 1, dim, value.shape[3], budget=budget, room=room)


def gather_kv(
    key: Tensor, value: Tensor, positions: Tensor, room: int, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """keys [B, K * (C + N), D], values [B, K * (C + N), Dv], lengths [B, K], as reference.gather_kv."""
    batch, kv_heads, budget = positions.shape
    shapes = gather_shapes(key, value, budget, room)
    tile = tile or find_tile("gather", shapes, key.device)
    key, value = rows_contiguous(key), rows_contiguous(value)
    keys, values = (s.new_empty(batch, kv_heads * shapes.slots, s.shape[3]) for s in (key, value))
    lengths = positions.new_empty(batch, kv_heads)
    grid = (-(-shapes.slots // tile.block_n), shapes.heads)
    launch(
        "gather",
        REGISTRY["gather"].plan(shapes, tile)[0],
        grid,
        key,
        value,
        positions.contiguous(),
        keys,
        values,
        lengths,
        *key.stride()[:3],
        *value.stride()[:3],
    )
    return keys, values, lengths


def decode_shapes(query: Tensor, keys: Tensor, values: Tensor, softcap: float = 0.0, sinks: bool = False) -> Shapes:
    """Shapes of `attend` for query [B, H, 1, D], keys [B, K, P, D], values [B, K, P, Dv]; P counts as the budget.

    P is rounded up, by an eighth at most: a draft's storage differs from prompt to prompt.
    """
    batch, kv_heads, slots, dim = keys.shape
    step = max(64, power_of_two(slots) // 16)
    slots = -(-slots // step) * step
    return Shapes(
        str(keys.dtype)[6:],
        batch,
        kv_heads,
        query.shape[1] // kv_heads,
        dim,
        values.shape[3],
        budget=slots,
        softcap=softcap,
        sinks=sinks,
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[B, H, 1, Dv] as reference.attend for one query, keys and values contiguous.

    Args: new: the token's key [B, K, 1, D] and value [B, K, 1, Dv], which `lengths` does not count yet: they are
    written into their slot and `lengths` advances, in place.
    """
    shapes = decode_shapes(query, keys, values, softcap, sinks is not None)
    kernel = "decode" if new is None else "decode_append"
    tile = tile or find_tile(kernel, shapes, keys.device)
    plan = REGISTRY[kernel].plan(shapes, tile)
    query = query.contiguous()
    key, value = (states.contiguous() for states in new) if new is not None else (query, query)
    out = query.new_empty(*query.shape[:3], values.shape[3])
    splits, members = plan[0].constants["SPLITS"], shapes.group
    partial = out if splits == 1 else out.new_empty(shapes.heads, splits, members, values.shape[3], dtype=torch.float32)
    lse = partial if splits == 1 else out.new_empty(shapes.heads, splits, members, dtype=torch.float32)
    launch(
        kernel,
        plan[0],
        (shapes.heads, splits),
        query,
        keys,
        values,
        lengths,
        key,
        value,
        lse if sinks is None else sinks.float(),
        out,
        partial,
        lse,
        keys.shape[2],
        scale,
    )
    if splits > 1:
        launch(kernel, plan[1], (shapes.heads, members), partial, lse, lengths, out)
    return out
