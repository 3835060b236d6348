"""Files appear whole: written beside their place, then renamed into it. And where those that nobody named go."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from specpass.errors import OutputFileError

COMPILED, INDUCTOR = "SPECPASS_COMPILED", "TORCHINDUCTOR_CACHE_DIR"  # variables that name folders


def check_folder(folder: Path) -> None:
    """Make `folder` and see that a file can be written to it: before the work whose result belongs there.

    Raises: OutputFileError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputFileError(
            f"{folder} cannot be written to: {error.strerror or error}. Name a folder that you may write to."
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` atomically, making its folder.

    Raises: OutputFileError: the file cannot be written there.
    """
    write_whole(path, lambda place: place.write_bytes(content.encode() if isinstance(content, str) else content))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """What `write` puts into the file that it is handed appears at `path`, or nothing does; its folder is made.

    Raises: OutputFileError: the file cannot be written there.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".tmp")
        os.close(handle)
        write(Path(name))
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except OSError as error:
        raise OutputFileError(
            f"{path} cannot be written: {error.strerror or error}. Name a file in a folder that you may write to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)  # gone where it was renamed


def cache_dir() -> Path:
    """The folder that specpass writes to: ``SPECPASS_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("SPECPASS_CACHE") or platformdirs.user_cache_dir("specpass"))


def datasets_dir() -> Path:
    """The folder of data sets that benchmarks ask about, put there by the user."""
    return cache_dir() / "datasets"


def tiles_dir() -> Path:
    """The folder of tuned tiles."""
    return cache_dir() / "tune"


def compiled_dir() -> Path:
    """The folder of what is compiled: ``SPECPASS_COMPILED``, which can be carried along, else `cache_dir`."""
    return Path(os.environ.get(COMPILED) or cache_dir())


def libraries_dir() -> Path:
    """The folder of compiled C++."""
    return compiled_dir() / "libraries"


def graphs_dir() -> Path:
    """The folder of captured drafts."""
    return compiled_dir() / "graphs"


def name_inductors_folder() -> None:
    """Have Inductor keep its code in ``SPECPASS_COMPILED`` too, where that is set: torch reads its own variable."""
    if kept := os.environ.get(COMPILED):
        os.environ[INDUCTOR] = str(Path(kept).absolute() / "inductor")
