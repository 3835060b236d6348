"""Where tuned tiles are kept: one JSON file for each kernel, shapes, architecture and Triton version.

Files are written whole and renamed into place, so any number of processes may tune and read at once. What cannot be
read, or was tuned for other sources, is a miss with a warning: the tile table serves instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specpass.kernels.shapes import Shapes
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.spec import Kernel

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """`folder()`: where entries are, asked each time. `write(path, text)`: writes a file whole or not at all."""

    folder: Callable[[], Path]
    write: Callable[[Path, str], None]


_place: Place | None = None


def use(folder: Callable[[], Path], write: Callable[[Path, str], None]) -> None:
    """Say where tuned tiles are kept; before, none is found. Arguments as in Place."""
    global _place
    _place = Place(folder, write)


def place() -> Place:
    """Raises: RuntimeError: nobody said where."""
    if _place is None:
        raise RuntimeError("nobody said where tuned tiles are kept: call specpass.kernels.store.use first.")
    return _place


def folder() -> Path:
    """The store's folder."""
    return place().folder()


def triton_version() -> str:
    """Version of the installed Triton, without importing it; "none" where there is none."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tuned tile depends on.

    `arch` is Arch.kind, `fingerprint` of the kernel's sources; budget and dtype are in `shapes`.
    """

    kernel: str
    shapes: Shapes
    arch: str
    fingerprint: str
    triton: str

    @classmethod
    def of(cls, kernel: Kernel, shapes: Shapes, arch: str) -> Key:
        return cls(kernel.name, shapes, arch, kernel.fingerprint, triton_version())

    @property
    def path(self) -> Path:
        """File of this key. Sources are not in its name: what another version of them left is replaced, not kept."""
        text = json.dumps([self.kernel, dataclasses.astuple(self.shapes), self.arch, self.triton])
        return folder() / f"{self.kernel}-{self.arch}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One tile, compiled: resources of its largest launch, seconds by the model, microseconds where measured.

    `time_us` is the median with a cold second-level cache, `warm_us` with a warm one. `error`: why it is no candidate.
    """

    tile: Tile
    regs: int
    spills: int
    shared_bytes: int
    predicted_s: float
    time_us: float | None = None
    warm_us: float | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a key: the tiles tried so far, and the winner once all were."""

    key: Key
    trials: tuple[Trial, ...] = ()
    winner: Trial | None = None

    @property
    def measured(self) -> bool:
        return self.winner is not None and self.winner.time_us is not None


def save(entry: Entry) -> None:
    """Write an entry atomically; the last of several writers wins, and no reader sees half a file.

    Raises: RuntimeError: nobody said where; and what `Place.write` raises.
    """
    place().write(entry.key.path, json.dumps({"format": FORMAT, **dataclasses.asdict(entry)}, indent=1))


def load(key: Key) -> Entry | None:
    """The entry of a key, or None; unreadable, stale and foreign files warn."""
    try:
        entry = read(key.path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn(key.path, f"it cannot be read ({type(error).__name__}: {error})")
        return None
    if dataclasses.replace(entry.key, fingerprint=key.fingerprint) != key:
        _warn(key.path, "it belongs to other shapes or another machine")
        return None
    if entry.key != key:
        _warn(key.path, f"it was tuned for other sources of the {key.kernel} kernel")
        return None
    return entry


def _warn(path: Path, reason: str) -> None:
    warnings.warn(
        f"specpass: the tuned tile in {path} is ignored: {reason}. Run `specpass tune` again, or "
        "`specpass tune --clear`.",
        stacklevel=3,
    )


def read(path: Path) -> Entry:
    """An entry as it was saved; raises what JSON and the dataclasses raise where it is none."""
    document: dict[str, Any] = json.loads(path.read_text())
    if document.pop("format") != FORMAT:
        raise ValueError("another format")
    key = document["key"]
    trials = tuple(_trial(fields) for fields in document["trials"])
    winner = document["winner"]
    return Entry(Key(**{**key, "shapes": Shapes(**key["shapes"])}), trials, None if winner is None else _trial(winner))


def _trial(fields: dict[str, Any]) -> Trial:
    tile = Tile(**fields["tile"])
    numbers = (tile.block_n, tile.block_m, tile.splits, tile.warps, tile.stages, fields["regs"], fields["spills"])
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"no tile: {tile}")
    return Trial(**{**fields, "tile": tile})


def entries() -> Iterator[Entry]:
    """All readable entries, by file name; the others warn."""
    for path in sorted(folder().glob("*.json")):
        try:
            yield read(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _warn(path, f"it cannot be read ({type(error).__name__}: {error})")


def clear() -> int:
    """Remove all entries; returns how many there were."""
    paths = [*folder().glob("*.json"), *folder().glob("*.tmp")]
    for path in paths:
        path.unlink(missing_ok=True)
    return sum(path.suffix == ".json" for path in paths)


def lookup(kernel: Kernel, shapes: Shapes, arch: str) -> Tile | None:
    """The tuned tile, or None."""
    if _place is None:
        return None
    entry = load(Key.of(kernel, shapes, arch))
    return entry.winner.tile if entry is not None and entry.winner is not None else None
