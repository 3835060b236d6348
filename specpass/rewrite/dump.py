"""Graphs as files: SPECPASS_DUMP names a folder, which gets one numbered, readable file for each pass."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch import fx

from specpass.rewrite.base import Request

_NUMBER = itertools.count()


def dump_to_folder(request: Request, name: str, gm: fx.GraphModule) -> None:
    """An observer of pipelines; nothing happens unless SPECPASS_DUMP is set."""
    folder = os.environ.get("SPECPASS_DUMP")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    gm.recompile()
    title = f"{request.kind}_{name}" if request.model == "target" else f"{request.model}_{request.kind}_{name}"
    type(gm).__name__ = title  # each GraphModule has a class of its own; the dump names it
    path = Path(folder) / f"{next(_NUMBER):03d}_{title}.py"
    partial = path.with_suffix(".tmp")
    partial.write_text(gm.print_readable(print_output=False))
    partial.rename(path)
