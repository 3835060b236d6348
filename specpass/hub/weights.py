"""Checks on weight files: cheap ones before a load, and the manifest of a converted model folder.

A safetensors file is ``u64 header length (little endian), JSON header, data``; each header entry holds dtype,
shape and the byte range of one tensor, so a truncated or edited file shows without reading its data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specpass.errors import CorruptWeightsError

MANIFEST = "specpass-manifest.json"
_MANIFEST_FORMAT = 1
_CHUNK = 1 << 22
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


def sha256_of(path: Path, advance: Callable[[int], Any] = lambda _: None) -> str:
    """Hex SHA-256 of a file; ``advance`` receives the bytes read since its last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def check_weights(path: str | Path) -> None:
    """Check the safetensors files of a model folder (or one file) from headers and lengths, reading no data.

    Raises:
        CorruptWeightsError: a file is truncated, too long, has a broken header, or an index names a shard or
            a tensor that is not there. The message names the file, both values and what to do.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    tensors = {file.name: _check_safetensors(file) for file in files}
    for index in sorted(path.glob("*.safetensors.index.json")):
        _check_index(index, tensors)


def _check_safetensors(file: Path) -> set[str]:
    """The tensor names of one safetensors file whose header agrees with its length."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _corrupt(file, f"has {size:,} bytes, fewer than its header of {length:,} bytes needs")
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        bits = {name: _BITS.get(entry["dtype"]) for name, entry in header.items()}
        counts = {name: math.prod(entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(file, f"has a header that is not safetensors JSON ({error})") from error
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _corrupt(file, f"stores tensor {name!r} at byte {start:,} where {end:,} is expected")
        width = bits[name]  # None: a dtype newer than this table, its size is not checked
        need = stop - start if width is None else counts[name] * width // 8
        if stop - start != need:
            raise _corrupt(file, f"gives tensor {name!r} {stop - start:,} bytes, its shape needs {need:,}")
        end = stop
    if size != 8 + length + end:
        raise _corrupt(file, f"has {size:,} bytes, its header describes {8 + length + end:,}")
    return set(header)


def _check_index(index: Path, tensors: dict[str, set[str]]) -> None:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(index, f"is not an index of shards ({error})") from error
    for tensor, shard in weight_map.items():
        if shard not in tensors:
            raise _corrupt(index, f"names shard {shard!r}, which is not in the folder")
        if tensor not in tensors[shard]:
            raise _corrupt(index, f"places tensor {tensor!r} in {shard!r}, which does not hold it")


def write_manifest(folder: Path, source_sha256: str) -> None:
    """Record size (bytes) and SHA-256 of every file in ``folder``, and the file that they were made from."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    content = {"format": _MANIFEST_FORMAT, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def verify_manifest(folder: Path, source_sha256: str, *, full: bool = False) -> None:
    """Compare a converted folder with its manifest: presence and sizes, with ``full`` the SHA-256 too.

    Raises:
        CorruptWeightsError: manifest missing or unreadable, made from another source, or a file differs.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text())
        files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        source = content["source_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(manifest, f"cannot be read ({error})") from error
    if source != source_sha256:
        raise _corrupt(manifest, f"names source SHA-256 {source}, expected {source_sha256}")
    for name, (size, digest) in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            have = "is missing" if found is None else f"has {found:,} bytes"
            raise _corrupt(file, f"{have}, expected {size:,} bytes")
        if full and (actual := sha256_of(file)) != digest:
            raise _corrupt(file, f"has SHA-256 {actual}, expected {digest}")


def _corrupt(file: Path, what: str) -> CorruptWeightsError:
    return CorruptWeightsError(f"{file} {what}. Delete {file.parent} and fetch or convert the model again.")
