"""An exported folder: prefill.onnx, decode.onnx, their data files, tokenizer files, and specpass.json about them.

Read here, without torch and without onnxruntime. specpass.json lists every file with its size and SHA-256; names that
lead outside of the folder, another version, and missing or truncated files are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from specpass.errors import BundleError

VERSION = 1
MANIFEST = "specpass.json"
PREFILL, DECODE = "prefill.onnx", "decode.onnx"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What specpass.json says.

    Attributes:
        method: its key (all hyperparameters), or "none".
        budgets: KV slots of each layer's heads, the most that one may have where they share budgets; empty where
            everything is kept.
        kv: [K, D, Dv] of each layer. dtype: of K and V, as numpy names it.
        compressed: whether positions are shifted behind the prompt (SpecPC).
        lookahead: tokens that the draft writes; context: positions that the draft can read, or None.
        eos_ids, pad_id, vocab, repetition_penalty: as the target's generation config has them.
        files: name -> {"bytes", "sha256"}. fingerprints: of the passes, the target and the draft.
    """

    method: str
    budgets: tuple[int, ...]
    kv: tuple[tuple[int, int, int], ...]
    dtype: str
    weights: str
    compressed: bool
    lookahead: int
    context: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab: int
    repetition_penalty: float
    files: dict[str, dict[str, Any]]
    fingerprints: dict[str, str]
    made_with: dict[str, str]
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_bundle(folder: str | Path, *, full: bool = False) -> Bundle:
    """The checked description of an exported folder.

    Args: full: read every byte and compare SHA-256; otherwise sizes are compared.
    Raises: BundleError naming the file and what to do.
    """
    folder = Path(folder)
    data = _read_manifest(folder / MANIFEST)
    if data.get("version") != VERSION:
        raise BundleError(
            f"{folder / MANIFEST} is of version {data.get('version')!r} and this specpass reads version {VERSION}: "
            "export the model again with `specpass export`."
        )
    try:
        bundle = Bundle(**data)
        bundle = dataclasses.replace(
            bundle,
            budgets=tuple(map(int, bundle.budgets)),
            eos_ids=tuple(map(int, bundle.eos_ids)),
            kv=tuple((int(k), int(d), int(v)) for k, d, v in bundle.kv),
        )
        needed = {name: int(entry["bytes"]) for name, entry in bundle.files.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BundleError(
            f"{folder / MANIFEST} does not describe an export ({error}): export the model again."
        ) from error
    for name, size in needed.items():
        check_file(folder, name, size, bundle.files[name].get("sha256") if full else None)
    for name in (PREFILL, DECODE):
        if name not in needed:
            raise BundleError(f"{folder / MANIFEST} does not list {name}: export the model again.")
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path} does not exist: name a folder that `specpass export` wrote, or export the model to it."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error}): export the model again.") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds no object: export the model again.")
    return data


def check_file(folder: Path, name: str, size: int, sha256: str | None = None) -> Path:
    """The path of a file of the folder, which has `size` bytes.

    Raises: BundleError: the name leads outside, or the file is missing, of another size or of other content.
    """
    parts = PurePosixPath(name).parts
    path = folder / name
    outside = not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name
    if outside or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which leads outside of the folder: do not use it.")
    if not path.is_file():
        raise BundleError(f"{path} is missing: copy the whole folder again, or export the model again.")
    if path.stat().st_size != size:
        raise BundleError(
            f"{path} has {path.stat().st_size:,} bytes and should have {size:,}: it is truncated or from another "
            "export. Copy the folder again, or export the model again."
        )
    if sha256 is not None and file_hash(path) != sha256:
        raise BundleError(f"{path} has other content than was exported: copy the folder again, or export again.")
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
