"""The store of tuned tiles: round trips, damaged and foreign files, several processes at once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import specpass.ops  # noqa: F401  (says where tiles are kept)
from specpass.kernels import store
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.store import Entry, Key, Trial
from specpass.kernels.tiles import Tile

DECODE = REGISTRY["decode"]
SHAPES = Shapes("float16", 2, 4, 2, 64, 64, budget=256, room=64)
TRIALS = tuple(Trial(Tile(16 << i, splits=i + 1), 40 + i, 0, 4096, 1e-6 * i, time_us=3.0 + i) for i in range(3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def entry() -> Entry:
    saved = Entry(Key.of(DECODE, SHAPES, "sm_90"), TRIALS, TRIALS[1])
    store.save(saved)
    return saved


def quietly(key: Key) -> Entry | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return store.load(key)


def test_round_trip_and_plain_misses_without_a_warning(entry: Entry) -> None:
    assert quietly(entry.key) == entry
    assert store.lookup(DECODE, SHAPES, "sm_90") == TRIALS[1].tile
    for other in (
        dataclasses.replace(entry.key, arch="sm_80"),
        dataclasses.replace(entry.key, triton="9.9"),
        dataclasses.replace(entry.key, kernel="gather"),
        dataclasses.replace(entry.key, shapes=dataclasses.replace(SHAPES, budget=512)),
        dataclasses.replace(entry.key, shapes=dataclasses.replace(SHAPES, dtype="bfloat16")),
    ):
        assert quietly(other) is None
    assert list(store.entries()) == [entry]


def test_an_unfinished_entry_gives_no_tile(entry: Entry) -> None:
    store.save(dataclasses.replace(entry, winner=None))
    assert store.lookup(DECODE, SHAPES, "sm_90") is None


def damage(document: dict[str, Any], how: str) -> str:
    text = json.dumps(document)
    if how == "truncated":
        return text[: len(text) // 2]
    if how == "another format":
        return json.dumps({**document, "format": 99})
    if how == "missing field":
        return json.dumps({name: value for name, value in document.items() if name != "trials"})
    if how == "tile of text":
        return json.dumps({**document, "winner": {**document["winner"], "tile": {"block_n": "64"}}})
    return {"empty": "", "list": "[1]", "not json": "\x00\x01", "number": "7", "null": "null"}[how]


@pytest.mark.parametrize(
    "how",
    ["truncated", "another format", "missing field", "tile of text", "empty", "list", "not json", "number", "null"],
)
def test_a_damaged_file_is_a_miss_with_a_warning(entry: Entry, how: str) -> None:
    path = entry.key.path
    path.write_text(damage(json.loads(path.read_text()), how))
    with pytest.warns(UserWarning, match=r"cannot be read.*specpass tune"):
        assert store.load(entry.key) is None
    with pytest.warns(UserWarning, match="cannot be read"):
        assert list(store.entries()) == []
    store.save(entry)
    assert quietly(entry.key) == entry


def test_binary_rubbish_and_folders_are_misses(entry: Entry) -> None:
    entry.key.path.write_bytes(b"\xff\xfe\x00{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert store.load(entry.key) is None
    entry.key.path.unlink()
    entry.key.path.mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert store.load(entry.key) is None


def test_stale_and_foreign_entries_are_misses_with_a_warning(entry: Entry) -> None:
    path = entry.key.path
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "key": {**document["key"], "fingerprint": "0" * 16}}))
    with pytest.warns(UserWarning, match="other sources of the decode kernel"):
        assert store.load(entry.key) is None
    path.write_text(json.dumps({**document, "key": {**document["key"], "arch": "sm_80"}}))
    with pytest.warns(UserWarning, match="other shapes or another machine"):
        assert store.load(entry.key) is None


def test_without_a_place_nothing_is_found_and_nothing_is_kept(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_place", None)
    assert store.lookup(DECODE, SHAPES, "sm_90") is None
    with pytest.raises(RuntimeError, match=r"store\.use"):
        store.save(entry)


def test_where_tiles_are_kept_is_asked_each_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.folder() == cache / "tune"
    monkeypatch.setenv("SPECPASS_CACHE", str(cache / "other"))
    assert store.folder() == cache / "other" / "tune"


WRITER = """
import sys, warnings
warnings.simplefilter("error")
import specpass.ops
from specpass.kernels import store
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.store import Entry, Key, Trial
from specpass.kernels.tiles import Tile
key = Key.of(REGISTRY["decode"], Shapes("float16", 2, 4, 2, 64, 64, budget=256, room=64), "sm_90")
trial = Trial(Tile(int(sys.argv[1])), 40, 0, 4096, 1e-6)
for _ in range(150):
    store.save(Entry(key, (trial,) * 20, trial))
    entry = store.load(key)
    assert len(entry.trials) == 20 and all(other == entry.winner for other in entry.trials)
"""


def test_several_processes_write_and_read_at_once(entry: Entry) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(16 << i)], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    for writer in writers:
        assert writer.wait(120) == 0, writer.stderr.read() if writer.stderr else ""
        if writer.stderr:
            writer.stderr.close()
    assert quietly(entry.key) is not None
    assert not list(store.folder().glob("*.tmp"))
