"""The notebook runs from top to bottom, offline, as it stands; its cells show what a notebook would show."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "docs" / "first_steps.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """The value of a cell's last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(FILE), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(FILE), "eval"), names)


def test_the_notebook_runs() -> None:
    cells = json.loads(FILE.read_text())["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        value = run_cell("".join(cell["source"]), names)
        if value is not None:
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    sizes, drafted, alone, report, exact = shown
    assert sizes == "torch.Size([1, 632])"
    for picture, method in ((drafted, "SpecKV"), (alone, "SnapKV")):
        assert "data:image/png;base64," in picture
        assert method in picture
        assert "64 of 600 prompt tokens" in picture
    assert drafted != alone
    assert report.startswith("<pre")
    assert exact == "True"
