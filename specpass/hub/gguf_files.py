"""A GGUF file of the user's as a transformers folder: checked, dequantized once, and anew when the file changes."""

from __future__ import annotations

import glob
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specpass.errors import CorruptWeightsError, GgufError, UnknownModelError
from specpass.files import cache_dir
from specpass.hub.once import make_once
from specpass.hub.weights import verify_manifest

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"


def converted(file: Path) -> Path:
    """The folder that ``file`` was converted to, in specpass's cache; the file itself is only read.

    Weights keep the file's own float type; quantized ones become bfloat16.

    Raises:
        UnknownModelError: it cannot be read.
        GgufError: it is no GGUF file, a part of one, or of an architecture that transformers does not read.
        CorruptWeightsError: it ends before its header says, or the converted folder was damaged.
        FetchError: the cache cannot be written to, or its disk is too small.
    """
    _check_magic(file)
    stat = file.stat()
    stem = f"{file.stem}-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    stamp = f"{stat.st_size}-{stat.st_mtime_ns}"
    folder = cache_dir() / "gguf" / f"{stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
    if folder.is_dir():
        verify_manifest(folder, stamp)
        return folder
    reader = _read(file)
    _check_architecture(file, reader)
    dtype = _dtype(reader)
    need = sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize

    def make(scratch: Path, done: Path) -> None:
        from specpass.hub.gguf import convert

        link = scratch / "model.gguf"  # which conversion deletes
        link.symlink_to(file.resolve())
        try:
            convert(file.name, link, done, dtype)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            raise GgufError(
                f"{file} cannot be converted: its tokenizer or its weights lack what transformers' reader asks for "
                f"({type(error).__name__}: {error}). Give the model's original folder or hub id instead."
            ) from error

    make_once(folder, stamp, need, make)
    for old in folder.parent.glob(f"{glob.escape(stem)}-????????"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_MAGIC))
    except OSError as error:
        raise UnknownModelError(f"{file} cannot be read: {error.strerror}. Name a file that you may read.") from error
    if start != _MAGIC:
        raise GgufError(
            f"{file} is no GGUF file: it begins with {start!r}, not {_MAGIC!r}. A model is a GGUF file, a folder, "
            "a hub id or a known name; of safetensors files name the folder."
        )


def _read(file: Path) -> Any:
    """Header and tensor table. Raises: CorruptWeightsError, GgufError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise CorruptWeightsError(
            f"{file} has {file.stat().st_size:,} bytes, and ends before what its header describes, or its header is "
            "damaged. Download it again."
        ) from error
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise GgufError(
            f"{file} is one of {parts.contents()} parts: join them, `llama-gguf-split --merge FIRST OUT` of llama.cpp."
        )
    return reader


def _check_architecture(file: Path, reader: Any) -> None:
    """Raises: GgufError: transformers makes no causal language model of it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from specpass.hub.gguf import quiet_reader

    field = reader.get_field("general.architecture")
    name = None if field is None else field.contents()
    config: Any = None
    cause: Exception | None = None
    try:
        with quiet_reader():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        cause = error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GgufError(
            f"{file} holds a model of architecture {name!r}, which transformers does not read from GGUF as a causal "
            "language model. Give the model's original folder or hub id instead."
        ) from cause


def _dtype(reader: Any) -> torch.dtype:
    """The float type of a file's matrices; bfloat16 where any is quantized. Vectors are float32 in most files."""
    import torch

    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    for kind, dtype in {"F32": torch.float32, "F16": torch.float16}.items():
        if kinds == {kind}:
            return dtype
    return torch.bfloat16
