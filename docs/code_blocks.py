"""A pass's docstring shows the graph before and after, in paragraphs of aligned lines: code blocks on the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module

_BLOCK = re.compile(r"^(?:before|prefill|decode): .*?(?=\n\n|\Z)", flags=re.M | re.S)


class CodeBlocks(Extension):
    """Fences them in modules' docstrings, which stay as they are in the source."""

    def on_module(self, *, mod: Module, **_: Any) -> None:
        if mod.docstring is not None:
            mod.docstring.value = _BLOCK.sub(r"```text\n\g<0>\n```", mod.docstring.value)
