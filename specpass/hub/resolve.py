"""Models by name, hub id, folder or GGUF file, as a local folder, a config, or loaded.

``model_path("smollm2-135m")`` is a folder that AutoModelForCausalLM and AutoTokenizer load, chat template
included. It lives in the user's cache folder (``SPECPASS_CACHE`` names another one). A path to an existing folder
is returned as it is, a GGUF file is converted into that cache, and OWNER/NAME, or OWNER/NAME@REVISION, is a model of
the Hugging Face hub, in that library's own cache: each serves wherever a model is asked for.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specpass.errors import CorruptWeightsError, EncoderDecoderError, RemoteCodeError, RevisionError, UnknownModelError
from specpass.files import cache_dir
from specpass.hub.gguf_files import converted
from specpass.hub.once import make_once
from specpass.hub.online import snapshot
from specpass.hub.sources import MODELS, ModelSource
from specpass.hub.weights import check_weights
from specpass.observe import progress

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_cached(name: str) -> bool:
    """Whether the named model was fetched before."""
    return (cache_dir() / "models" / name).is_dir()


def model_path(name_or_path: str | os.PathLike[str]) -> Path:
    """A local folder with config, weights, tokenizer and chat template.

    A named model is fetched on first use, a GGUF file converted on first use. OWNER/NAME@REVISION is a branch, tag or
    commit of a hub model.

    Raises:
        UnknownModelError: neither a known name nor an existing folder or file nor a model of the hub.
        GgufError: a file that is no GGUF file, or one that transformers does not read.
        GatedModelError: the hub gives the model only to those who accepted its terms.
        RevisionError: a revision that the hub does not have, or of something that is not from the hub.
        FetchError: a download failed, a hub id is not cached and the hub is out of reach, the cache folder cannot be
            written to, or the disk is too small.
        CorruptWeightsError: a download, a GGUF file or a cached folder is not what it should be.
    """
    name = str(name_or_path)
    source = MODELS.get(name.lower())
    if source is not None:
        return _named(source)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return converted(path)
    base, _, revision = name.partition("@")
    if revision and (base.lower() in MODELS or Path(base).expanduser().exists()):
        raise RevisionError(
            f"revision {revision!r} of {base!r}: only models of the hub (OWNER/NAME) have revisions. Leave it out."
        )
    if path.suffix.lower() == ".gguf" or name.startswith((".", "/", "~")):
        raise UnknownModelError(f"there is no file or folder {name!r}: check the path.")
    if _HUB_ID.fullmatch(base):
        return snapshot(base, revision or None)
    alike = difflib.get_close_matches(name.lower(), MODELS, n=1)
    meant = f" Did you mean {alike[0]}?" if alike else ""
    raise UnknownModelError(
        f"{name!r} is neither a known model name nor an existing folder or GGUF file nor a hub id (OWNER/NAME).{meant} "
        f"Known names: {', '.join(MODELS)}; a folder needs config.json, weights and a tokenizer."
    )


def at_revision(name: str, revision: str | None) -> str:
    """The name of a model's revision, as `model_path` reads it."""
    return name if revision is None else f"{name}@{revision}"


def _named(source: ModelSource) -> Path:
    from specpass.hub.gguf import convert, fetch

    def make(scratch: Path, done: Path) -> None:
        convert(source.name, fetch(source, scratch), done)

    folder = cache_dir() / "models" / source.name
    return make_once(folder, source.sha256, 2 * source.size + source.disk, make)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") + "." if lines else f"{type(error).__name__}."


def read_config(name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The config of a causal language model; `_name_or_path` is its folder.

    ``trust_remote_code`` lets Python files of the model's folder run, as in transformers.

    Raises what `model_path` raises; UnknownModelError: the folder holds no causal language model;
    EncoderDecoderError: it holds an encoder-decoder; RemoteCodeError: it needs its own code, which is not trusted.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = any_config(name_or_path, trust_remote_code=trust_remote_code)
    folder = config._name_or_path
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderDecoderError(
            f"{folder} holds a {config.model_type}, an encoder-decoder; specpass prunes the prompt of decoder-only "
            "models: choose one that AutoModelForCausalLM loads."
        )
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own:
        raise UnknownModelError(
            f"{folder} holds a {config.model_type}, which is no causal language model in transformers: "
            "choose a model that AutoModelForCausalLM loads."
        )
    return config


def any_config(name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The config of a model of any kind; `_name_or_path` is its folder.

    Raises what `model_path` raises; UnknownModelError: transformers reads none there; RemoteCodeError.
    """
    from transformers import AutoConfig

    folder = model_path(name_or_path)
    if not (folder / "config.json").is_file():
        raise UnknownModelError(
            f"{folder} has no config.json: a model folder needs config.json, weights and a tokenizer. Of a GGUF file "
            "give the file's own path."
        )
    if not trust_remote_code:
        _check_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UnknownModelError(
            f"{folder} holds no model that transformers knows: {_first_line(error)} "
            "A model folder needs config.json, weights and a tokenizer."
        ) from error
    config._name_or_path = str(folder)
    return config


def _check_code(folder: Path) -> None:
    """Raises: RemoteCodeError: transformers has no class for the model, and its folder has one of its own."""
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads((folder / "config.json").read_text())
        own, kind = config.get("auto_map"), config.get("model_type")
    except (OSError, ValueError, AttributeError):
        return  # no config: who reads it says so
    if own and kind not in CONFIG_MAPPING:
        raise RemoteCodeError(
            f"{folder} holds a {kind!r}, which transformers has no class for; the model brings its own code: read "
            "its .py files, then pass --trust-remote-code (trust_remote_code=True) to run them."
        )


def load(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | str = "auto", *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` in eval mode on the CPU; ``dtype`` as in transformers, "auto" is the stored one.

    Raises what `read_config` raises, UnknownModelError where the folder has no weights or no tokenizer, and
    CorruptWeightsError when weights do not match the folder's config.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(name_or_path, trust_remote_code=trust_remote_code)
    folder = Path(config._name_or_path)
    check_weights(folder)
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    # Mismatches are reported, not raised, so that the error can name them all; nothing is returned with them.
    try:
        with progress.task(f"loading {folder.name}"):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **given
            )
    except OSError as error:
        raise UnknownModelError(
            f"{folder} has no weights that load: {_first_line(error)} It needs *.safetensors files beside config.json; "
            "a download that was cut off goes on when it is run again with the network there."
        ) from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise CorruptWeightsError(
            f"{folder} holds weights that do not match its config.json: {len(wrong)} missing or of another "
            f"shape, first {wrong[0]}. Put the config.json and the weights of one model into the folder."
        )
    return model.eval(), load_tokenizer(folder, trust_remote_code=trust_remote_code)


def load_tokenizer(name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer. Raises what `model_path` raises; UnknownModelError: the folder has none that loads."""
    from transformers import AutoTokenizer

    folder = model_path(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        found = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        reason = f"a tokenizer that does not load: {_first_line(error)}" if found else "no tokenizer."
        raise UnknownModelError(
            f"{folder} has {reason} Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) beside it."
        ) from error
