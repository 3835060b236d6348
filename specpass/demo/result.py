"""One row of the demo's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

import specpass
from specpass.demo.prompt import EXPECTED, FACT


@dataclass(frozen=True)
class Result:
    """One row of the table; times in seconds, ``compile_s`` None where nothing is compiled.

    ``kept``: prompt positions by layer and KV head, None where all are kept.
    """

    method: str
    answer: str
    slots: int
    cache_bytes: int
    first_token_s: float
    decode_rate: float  # tokens per second after the first
    compile_s: float | None
    kept: tuple[tuple[tuple[int, ...], ...], ...] | None = None

    @property
    def right(self) -> bool:
        return self.answer.strip().strip("\"'`") == EXPECTED


def kept_positions(cache: Any) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    """Prompt positions that a BudgetCache kept of its first row, by layer and KV head; None for other caches."""
    if not isinstance(cache, specpass.BudgetCache):
        return None
    return tuple(
        tuple(
            tuple(position for position in head if position >= 0) for head in layer.tensors()["positions"][0].tolist()
        )
        for layer in cache.layers
    )


def table(results: list[Result], title: str) -> Table:
    table = Table(title=title)
    for column in ("method", "answer", ""):
        table.add_column(column)
    for column in ("slots per\nKV head", "KV MiB", "first\ntoken s", "decode\ntokens/s", "compile s"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row.method,
            row.answer,
            "[green]right[/green]" if row.right else "[red]wrong[/red]",
            f"{row.slots:,}",
            f"{row.cache_bytes / 2**20:.1f}",
            f"{row.first_token_s:.1f}",
            f"{row.decode_rate:.1f}",
            "-" if row.compile_s is None else f"{row.compile_s:.0f}",
        )
    table.caption = f"the fact: {FACT}"
    return table
