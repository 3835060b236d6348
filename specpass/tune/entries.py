"""Tuned tiles for people and programs: as JSON, as modules, as a table."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specpass.files import write_file
from specpass.kernels import store
from specpass.kernels.store import Entry


def describe(entry: Entry) -> dict[str, Any]:
    """A winner as JSON. `config` is null where no tile fits: the table's tile, or torch's operator, serves."""
    winner = entry.winner
    base: dict[str, Any] = {
        "kernel": entry.key.kernel,
        "arch": entry.key.arch,
        "dtype": entry.key.shapes.dtype,
        "shapes": dataclasses.asdict(entry.key.shapes),
        "triton": entry.key.triton,
        "config": None if winner is None else dataclasses.asdict(winner.tile),
    }
    if winner is None:
        return {**base, "regs": None, "spills": None, "shared_bytes": None, "measured": False}
    base |= {
        "regs": winner.regs,
        "spills": winner.spills,
        "shared_bytes": winner.shared_bytes,
        "measured": entry.measured,
        "predicted_us": round(winner.predicted_s * 1e6, 2),
    }
    if winner.time_us is not None:
        base |= {"time_us": winner.time_us, "warm_us": winner.warm_us}
    return base


def emit_modules(found: list[Entry], folder: Path) -> None:
    """Write the module of each winner: the kernel with this site's constants bound."""
    from specpass.kernels.emit import emit
    from specpass.kernels.registry import REGISTRY

    for entry in found:
        if entry.winner is not None:
            kernel, shapes = entry.key.kernel, entry.key.shapes
            size = f"_{shapes.slots}" if shapes.slots else ""
            text = emit(REGISTRY[kernel], shapes, entry.winner.tile)
            write_file(folder / f"{kernel}{size}_{entry.key.arch}.py", text)


def show_store() -> None:
    """A table of all entries."""
    table = Table("kernel", "arch", "dtype", "heads x dim", "slots", "tile", "regs", "shared", "time")
    for entry in store.entries():
        shapes, winner = entry.key.shapes, entry.winner
        sizes = (f"{shapes.kv_heads} x {shapes.dim}", str(shapes.slots or "-"))
        if winner is None:
            table.add_row(entry.key.kernel, entry.key.arch, shapes.dtype, *sizes, "unfinished or none", "", "", "")
            continue
        tile = winner.tile
        time = "not measured" if winner.time_us is None else f"{winner.time_us:.1f} us"
        table.add_row(
            entry.key.kernel,
            entry.key.arch,
            shapes.dtype,
            *sizes,
            f"{tile.block_n}, {tile.block_m}, {tile.splits} splits, {tile.warps} warps, {tile.stages} stages",
            str(winner.regs),
            str(winner.shared_bytes),
            time,
        )
    Console(width=None if os.isatty(1) else 160).print(table)
    print(f"{table.row_count} in {store.folder()}")
