"""One row of the demo's table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

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
    answer_s: float  # of the whole answer, the prompt's reading included
    compile_s: float | None
    kept: tuple[tuple[tuple[int, ...], ...], ...] | None = None

    @property
    def right(self) -> bool:
        return self.answer.strip().strip("\"'`") == EXPECTED


class Rows:
    """The table, printed a row at a time: each is there as soon as it is known.

    Attributes: rows: so far.
    """

    # Heading, width of its cells, justification; the answer takes what is left.
    COLUMNS: tuple[tuple[str, int | None, JustifyMethod], ...] = (
        ("method", 12, "left"),
        ("answer", None, "left"),
        ("", 5, "left"),
        ("slots per\nKV head", 9, "right"),
        ("KV MiB", 6, "right"),
        ("first\ntoken s", 7, "right"),
        ("answer\ns", 6, "right"),
        ("compile\ns", 7, "right"),
    )
    ANSWER = range(12, 41)  # its least and its greatest width

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.rows: list[Result] = []

    def add(self, row: Result) -> None:
        fixed = sum((width or 0) + 1 for _, width, _ in self.COLUMNS)
        answer = min(max(self.console.width - fixed, self.ANSWER.start), self.ANSWER.stop - 1)
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=not self.rows, collapse_padding=True)
        for heading, width, justify in self.COLUMNS:
            table.add_column(heading, width=answer if width is None else width, justify=justify, overflow="fold")
        table.add_row(
            row.method,
            Text(row.answer.strip()),
            "[green]right[/green]" if row.right else "[red]wrong[/red]",
            f"{row.slots:,}",
            f"{row.cache_bytes / 2**20:.1f}",
            f"{row.first_token_s:.1f}",
            f"{row.answer_s:.1f}",
            "-" if row.compile_s is None else f"{row.compile_s:.0f}",
        )
        if not self.rows:
            self.console.print(f"{self.title}\nthe fact: {FACT}\n", highlight=False, markup=False)
        self.console.print(table)
        self.rows.append(row)
