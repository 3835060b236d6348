"""A prefix as a file: what was saved comes back, and everything else is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import compile_eager, run
from tiny import prompt, tiny

import specpass
from specpass import errors
from specpass.backend import direct
from specpass.cache import prefix_file
from specpass.files import write_whole


def make_model() -> Any:
    """Without graphs, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "why_uncompiled", lambda target: "a test says so")
        return compile_eager(tiny(), specpass.SnapKV(budget=24, window=8))


@pytest.fixture(scope="module")
def prefix() -> specpass.Prefix:
    return specpass.read(make_model(), prompt(40))


def test_saved_and_loaded(prefix: specpass.Prefix, tmp_path: Path) -> None:
    file = tmp_path / "own" / "doc.prefix"
    prefix.save(file)
    prefix.save(file)  # in place of the first
    found = specpass.Prefix.load(file)
    assert [entry.name for entry in file.parent.iterdir()] == ["doc.prefix"]
    assert found.key == prefix.key
    assert found.nbytes == prefix.nbytes
    for pair, own in zip(found.pairs, prefix.pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, own, strict=True))
    model = make_model()  # as another process makes it
    assert run(model, prompt(9, seed=1), prefix=found).tokens == run(model, prompt(9, seed=1), prefix=prefix).tokens


def test_other_files(prefix: specpass.Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "doc.prefix"
    with pytest.raises(errors.PrefixFileError, match="is no file"):
        specpass.Prefix.load(file)
    file.write_bytes(b"")
    with pytest.raises(errors.PrefixFileError, match="a part of one"):
        specpass.Prefix.load(file)
    prefix.save(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 5)
    with pytest.raises(errors.PrefixFileError, match="Read the document anew"):
        specpass.Prefix.load(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(errors.PrefixFileError, match="holds tensors and no prefix"):
        specpass.Prefix.load(file)
    monkeypatch.setattr(prefix_file, "VERSION", 99)
    prefix.save(file)
    monkeypatch.undo()
    with pytest.raises(errors.PrefixVersionError, match="version 99"):
        specpass.Prefix.load(file)
    with pytest.raises(errors.OutputFileError, match="may write"):
        prefix.save("/dev/null/doc.prefix")


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        place.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "doc.prefix", write)
    assert not list(tmp_path.iterdir())
