"""Files beside the tree as if they stood in it: each package of specpass looks into a second folder as well."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def overlay(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """While open, `folder`/specpass/passes/own.py is `specpass.passes.own`; afterwards nobody has it loaded.

    Yields: what undoes further changes together with this one.
    """
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for part in (folder / "specpass").iterdir():
            package = importlib.import_module(f"specpass.{part.name}")
            patch.setattr(package, "__path__", [*package.__path__, str(part)])
        yield patch
    for name in set(sys.modules) - before:
        if str(vars(sys.modules[name]).get("__file__")).startswith(str(folder)):
            del sys.modules[name]
            package_name, _, own = name.rpartition(".")
            if package_name in sys.modules:
                vars(sys.modules[package_name]).pop(own, None)
