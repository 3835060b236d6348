"""A report's tables for notebooks."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

WIDTH = 140  # columns, of a cell that scrolls
_FORMAT = '<pre style="overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


def html(tables: RenderableType) -> str:
    """What rich prints of `tables`, as HTML."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
    console.print(tables, markup=False, highlight=False)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
