"""Folders in specpass's cache that are made once: by one process, on a disk with room, complete or not there."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from specpass.errors import FetchError
from specpass.hub.weights import verify_manifest, write_manifest
from specpass.observe import progress

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def make_once(folder: Path, source: str, need: int, make: Callable[[Path, Path], None]) -> Path:
    """`folder`, made where it is not there; what another process makes of it is waited for.

    Args:
        source: what it is made from, as its manifest will say.
        need: bytes on the disk while it is made.
        make: called with a scratch folder beside it and the folder to write, which does not exist yet.

    Raises:
        FetchError: the cache folder cannot be written to, or its disk is too small.
        CorruptWeightsError: the folder is not what its manifest says.
    """
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        except OSError as error:
            raise _unwritable(folder.parent, error) from error
        try:
            if not folder.is_dir():  # another process may have made it while this one waited
                _make(folder, source, need, make)
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise _unwritable(folder.parent, error) from error
        finally:
            lock.release()
    verify_manifest(folder, source)
    return folder


def _unwritable(folder: Path, error: OSError) -> FetchError:
    return FetchError(
        f"{folder} cannot be written to: {error.strerror}. Set SPECPASS_CACHE to a folder that you may write to."
    )


def _lock(folder: Path) -> BaseFileLock:
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress.task(f"waiting for another process that makes {folder.name}"):
            lock.acquire()
    return lock


def _make(folder: Path, source: str, need: int, make: Callable[[Path, Path], None]) -> None:
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise FetchError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {folder.name} needs {need / 1e9:.1f} GB while it "
            "is converted. Free some space, or set SPECPASS_CACHE to a folder on a larger disk."
        )
    # Beside the folder, since a rename must stay on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        done = Path(name) / "model"
        make(Path(name), done)
        write_manifest(done, source)
        os.rename(done, folder)  # atomic: a folder of this name is complete or not there
