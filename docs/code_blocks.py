"""A pass's docstring shows the graph before and after, in paragraphs of aligned lines: code blocks on the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Module

_BLOCK = re.compile(r"^(?:before|prefill|decode): .*?(?=\n\n|\Z)", flags=re.M | re.S)


class CodeBlocks(Extension):
    """Fences them in docstrings of modules and classes, which stay as they are in the source."""

    def on_module(self, *, mod: Module, **_: Any) -> None:
        _fence(mod)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        _fence(cls)


def _fence(documented: Module | Class) -> None:
    if documented.docstring is not None:
        documented.docstring.value = _BLOCK.sub(r"```text\n\g<0>\n```", documented.docstring.value)
