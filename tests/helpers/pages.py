"""Examples of the documentation, as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str, section: str, language: str = "python") -> str:
    """The first code block of a language in one section of a page."""
    return re.findall(rf"```{language}\b[^\n]*\n(.*?)```", _text(page, section), re.DOTALL)[0]


def titled(page: str, section: str) -> dict[str, str]:
    """The code blocks of a section that are files, by the path in their title."""
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', _text(page, section), re.DOTALL))


def apply(diff: str, source: str) -> str:
    """`source` with the added lines of a diff, each behind the line that the diff shows above it."""
    above = ""
    for line in diff.splitlines():
        if line.startswith("+"):
            assert source.count(above) == 1, f"{above!r} stands once in the file that the diff is of"
            source = source.replace(above, f"{above}{line[1:]}\n")
        above = f"{line[1:]}\n"
    return source


def _text(page: str, section: str) -> str:
    return (DOCS / page).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
