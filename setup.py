"""The long description of the archives: README.md, as it can be read where neither its picture nor the files are."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

PICTURE = re.compile(r"!\[([^]]*)\]\((?!\w+:)([^)]+)\)")
LINK = re.compile(r"\[([^]]*)\]\((?!\w+:|#)([^)]+)\)")


def described(readme: str) -> str:
    """Links to files of the repository as their names, its pictures as what they show."""
    return LINK.sub(r"\1 (`\2`)", PICTURE.sub(r"*(`\2` in the repository: \1.)*", readme))


setup(
    long_description=described((Path(__file__).parent / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
