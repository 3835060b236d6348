"""The build backend: an sdist's bytes depend on its files and on SOURCE_DATE_EPOCH alone."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools")
PATH = Path(__file__).parents[1] / ".ci" / "reproducible.py"


def backend() -> Any:
    spec = importlib.util.spec_from_file_location("reproducible", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(path: Path, when: int, mode: int, owner: str, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode, member.uname = len(name), when, mode, owner
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def test_times_modes_owners_and_order_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = pack(tmp_path / "first.tar.gz", 1, 0o644, "me", ["p/b", "p/a"])
    second = pack(tmp_path / "second.tar.gz", 2, 0o664, "you", ["p/a", "p/b"])
    for archive in (first, second):
        backend().normalize(archive)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert [(member.name, member.mtime, member.mode) for member in archive] == [
            ("p/a", 1700000000, 0o644),
            ("p/b", 1700000000, 0o644),
        ]
        assert archive.extractfile("p/b").read() == b"p/b"
