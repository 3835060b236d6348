"""C++ sources beside this file become shared libraries on first use: plain C functions, called through ctypes.

They include neither Python's nor torch's headers, so that one compiles in about a second and serves any version of
torch. Tensors come as addresses and strides; what is parallel is OpenMP's, in the threads that torch has made.

A library is compiled beside its place and renamed into it: any number of processes may do so at once. Its name holds
what it was made of, so that other sources, flags or machines find another one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from specpass.kernels.cpu.isa import ANY, Isa

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w")
TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Source:
    """`name`.cpp in this folder, for a CPU that has `isa`."""

    name: str
    isa: Isa = ANY

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.cpp"


class Unbuilt(Exception):
    """Why there is no library, as a clause for the report."""


_folder: Callable[[], Path] | None = None


def use(folder: Callable[[], Path]) -> None:
    """Say where libraries are kept; it is asked each time. Before, there are none."""
    global _folder
    _folder = folder
    load.cache_clear()


@functools.cache
def load(source: Source) -> ctypes.CDLL | Unbuilt:
    """The library of a source, compiled unless it is there; or why there is none. Found once in a process.

    Callers set `argtypes` and `restype` of its functions.
    """
    try:
        _check_machine(source)
        path = _place(source)
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                pass  # from another system, or damaged: compile it anew
        _compile(source, path)
        return ctypes.CDLL(str(path))
    except Unbuilt as why:
        return why
    except OSError as error:
        return Unbuilt(f"{source.name}.cpp: {error}")


def _check_machine(source: Source) -> None:
    has = torch.cpu.get_capabilities()
    lacking = [name for name in source.isa.needs if not has.get(name)]
    if lacking:
        raise Unbuilt(f"this CPU has no {', '.join(lacking)}")


def _place(source: Source) -> Path:
    if _folder is None:
        raise Unbuilt("nobody said where libraries are kept: call specpass.kernels.cpu.build.use first")
    headers = [header.read_text() for header in sorted(FOLDER.glob("*.h"))]
    made_of = (source.path.read_text(), *headers, *FLAGS, *source.isa.flags, platform.system(), platform.machine())
    return _folder() / f"{source.name}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]}.so"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise Unbuilt(f"no C++ compiler ({named or ', '.join(COMPILERS)}): install one, or name it in CXX")


def _compile(source: Source, path: Path) -> None:
    compiler = _compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *source.isa.flags, str(source.path), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Unbuilt(f"{compiler} took more than {TIMEOUT_S} s for {source.name}.cpp") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise Unbuilt(f"{compiler} failed on {source.name}.cpp: {said[0] if said else 'it said nothing'}")
        os.replace(made, path)
