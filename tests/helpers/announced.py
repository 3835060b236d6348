"""Packages with methods of one's own, as pip would install them: a module, and metadata that announces its classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

# Toy: a method like SnapKV.
SNAP = """
import dataclasses

import specpass


@dataclasses.dataclass(frozen=True)
class Toy(specpass.SnapKV):
    factor: int = 2
"""


def announce(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, points: Iterable[str], package: str = ""
) -> None:
    """Put `module` into `folder`, and `folder` on the path, with entry points such as "toy = module:Toy"."""
    (folder / f"{module}.py").write_text(source)
    package = package or module
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join(["[specpass.methods]", *points]) + "\n")
    monkeypatch.syspath_prepend(str(folder))
