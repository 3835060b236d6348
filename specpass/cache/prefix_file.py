"""A prefix as a file of safetensors: tensors by layer, and in its header who read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specpass._version import __version__
from specpass.cache.identity import Identity
from specpass.cache.prefix import Pair, Prefix
from specpass.errors import PrefixFileError, PrefixVersionError
from specpass.files import write_whole

FORMAT, VERSION = "specpass-prefix", 1


def save(prefix: Prefix, path: Path) -> None:
    """Raises: OutputFileError."""
    tensors = {"ids": prefix.ids}
    for index, pair in prefix.layers.items():
        tensors |= named("target", index, pair)
    for index, pair in enumerate(prefix.draft or ()):
        tensors |= named("draft", index, pair)
    told = {
        "format": FORMAT,
        "version": str(VERSION),
        "specpass": __version__,
        "target": json.dumps(dataclasses.asdict(prefix.target)),
        "draft": "" if prefix.drafter is None else json.dumps(dataclasses.asdict(prefix.drafter)),
    }

    def write(place: Path) -> None:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place, told)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error

    write_whole(path, write)


def named(model: str, index: int, pair: Pair) -> dict[str, Tensor]:
    return {f"{model}.{index}.key": pair[0], f"{model}.{index}.value": pair[1]}


def load(path: Path) -> Prefix:
    """Raises: PrefixFileError, PrefixVersionError."""
    anew = "Read the document anew: specpass.read(model, document_ids).save(path)."
    if not path.is_file():
        raise PrefixFileError(f"{path} is no file, and a prefix was to be there: name one that Prefix.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            check_version(path, told, anew)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise PrefixFileError(f"{path} is no file of safetensors, or a part of one ({error}). {anew}") from error
    draft = pairs_of(tensors, "draft")
    return Prefix(
        tensors["ids"],
        pairs_of(tensors, "target"),
        list(draft.values()) if told["draft"] else None,
        Identity(**json.loads(told["target"])),
        Identity(**json.loads(told["draft"])) if told["draft"] else None,
    )


def check_version(path: Path, told: dict[str, Any], anew: str) -> None:
    """Raises: PrefixFileError: some other file of safetensors. PrefixVersionError."""
    if told.get("format") != FORMAT:
        raise PrefixFileError(f"{path} holds tensors and no prefix: name a file that Prefix.save wrote.")
    if told.get("version") != str(VERSION):
        raise PrefixVersionError(
            f"{path} is a prefix of version {told.get('version')} (specpass {told.get('specpass')}), and specpass "
            f"{__version__} reads version {VERSION}. {anew}"
        )


def pairs_of(tensors: dict[str, Tensor], model: str) -> dict[int, Pair]:
    """Keys and values by layer."""
    numbers = sorted(
        int(name.split(".")[1]) for name in tensors if name.startswith(f"{model}.") and name[-4:] == ".key"
    )
    return {index: (tensors[f"{model}.{index}.key"], tensors[f"{model}.{index}.value"]) for index in numbers}
