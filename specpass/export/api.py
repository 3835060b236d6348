"""export_onnx: a target with its draft and method as a folder that runs without torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specpass._version import __version__
from specpass.backend import checks
from specpass.capture.devices import device_of
from specpass.errors import (
    BudgetError,
    DtypeMismatchError,
    ExportError,
    FuturesError,
    LookaheadError,
    OnnxMissingError,
    OutputFileError,
    SpreadError,
)
from specpass.files import write_file
from specpass.methods.base import Method
from specpass.observe import progress
from specpass.passes.attend_slots import UNSPREAD
from specpass.passes.share_layers import UNLIKE
from specpass.rewrite import Refusal
from specpass.runtime.bundle import DECODE, MANIFEST, PREFILL, Bundle, file_hash
from specpass.sizes import context_length, eos_ids

PACKAGES = ("onnx", "onnx_ir", "onnxscript")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
TARGET_DATA, DRAFT_DATA = "target.onnx_data", "draft.onnx_data"
WEIGHTS = ("float", "int8")


def export_onnx(
    target: nn.Module,
    draft: nn.Module | None = None,
    method: Method | None = None,
    out: str | Path = "specpass-onnx",
    *,
    weights: str = "float",
    tokenizer: Any = None,
) -> Path:
    """Write `target`, pruned by `method`, to the folder `out`: prefill.onnx, decode.onnx, data files, specpass.json.

    Args:
        target: a Hugging Face decoder in eval mode, in float32 or float16; it is left as it is.
        draft: a smaller one with the same tokenizer, likewise.
        method: e.g. specpass.SpecKV(budget=256, window=32, lookahead=16); None exports the exact model. Where it names
            no lookahead, L is 32: a constant of the export.
        out: a new folder, or an earlier export, which is replaced once the new one is complete.
        weights: "float" as the models have them, or "int8" through ONNX Runtime's dynamic quantizer.
        tokenizer: a Hugging Face tokenizer, or the folder of one, whose files are put beside.

    Returns: the folder, to be opened with specpass.runtime.load.

    Raises:
        ExportError: an architecture or operator that has no ONNX form; names the layer.
        SpecpassError: OnnxMissingError, BudgetError (a ratio), LookaheadError, DtypeMismatchError, OutputFileError,
            SpreadError (KV heads that cannot share budgets); and what specpass.compile raises for a draft or target
            that does not fit.
    """
    check_packages(weights)
    if method is not None:
        checks.check_method(method)
    checks.check_decoder(target, "target")
    checks.check_one_device("target", target)
    check_method(method)
    if method is None or not method.drafts:
        draft = None
    else:
        checks.check_draft(draft, method)
        checks.check_pair(target.config, device_of(target), draft)
    check_dtype(target, "target")
    if draft is not None:
        check_dtype(draft, "draft")
    if weights not in WEIGHTS:
        raise ExportError(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}.")
    out = Path(out)
    with folder_that_appears_whole(out) as folder:
        write_graphs(folder, target, draft, method)
        if weights == "int8":
            from specpass.export.quantize import quantize

            with progress.task("quantizing"):
                quantize(folder)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        bundle = describe(folder, target, draft, method, weights)
        write_file(folder / MANIFEST, bundle.to_json())
    return out


def check_packages(weights: str) -> None:
    needed = (*PACKAGES, *(("onnxruntime",) if weights == "int8" else ()))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxMissingError(
            f"ONNX export needs {', '.join(missing)}, which is not installed: pip install 'specpass[onnx]'"
        )


def check_method(method: Method | None) -> None:
    if method is None:
        return
    if method.share is not None:
        raise BudgetError(
            f"budget={method.budget!r}, share={method.share}: a budget is chosen for each prompt, and an export "
            "has a constant one: give a count alone, e.g. budget=256."
        )
    if not isinstance(method.budget, int):
        raise BudgetError(
            f"budget={method.budget} is a ratio, and an exported graph has a constant budget: give a "
            "count, e.g. budget=256."
        )
    if method.futures > 1:
        raise FuturesError(f"futures={method.futures}: an exported draft writes one; leave futures out.")
    if method.writes_itself:
        raise LookaheadError(
            f"lookahead={method.lookahead!r}: an exported prefill reads the prompt once, before the target has written "
            "anything: export with a draft, or with lookahead='ngram'."
        )
    if method.lookahead_ids is not None:
        raise LookaheadError("lookahead_ids are those of one prompt, and an export serves all: export with a draft.")


def check_dtype(model: nn.Module, name: str) -> None:
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise DtypeMismatchError(
            f"the {name} is in {dtype}, and exports are in float32 or float16: load target and "
            "draft with dtype='float32'."
        )


@contextlib.contextmanager
def folder_that_appears_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is removed when not.

    Raises: OutputFileError: `out` is something else than an earlier export, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise OutputFileError(f"{out} exists and is no earlier export (it has no {MANIFEST}): name a new folder.")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".tmp"))
    except OSError as error:
        raise OutputFileError(f"{out} cannot be written: {error}. Name a folder that you may write to.") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        old = folder.with_suffix(".old")
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_graphs(
    folder: Path, target: nn.Module, draft: nn.Module | None, method: Method | None, *, unrolled: bool = False
) -> None:
    """Both graphs and their data files; `unrolled` as in pruned.capture_target."""
    import onnx_ir as ir

    from specpass.export.bind import WeightFile, bind_weights
    from specpass.export.pruned import capture_target
    from specpass.export.translate import translate

    try:
        with progress.task("tracing"):
            capture = capture_target(target, method, draft, unrolled)
    except Refusal as refusal:
        if refusal.reason in (UNSPREAD, UNLIKE):
            raise SpreadError(f"this architecture cannot be exported with shared budgets: {refusal}.") from refusal
        raise ExportError(f"this architecture cannot be exported: {refusal}. specpass.compile runs it.") from refusal
    files = {"target": WeightFile(folder / TARGET_DATA), "draft": WeightFile(folder / DRAFT_DATA)}
    for name, program in ((PREFILL, capture.prefill), (DECODE, capture.decode)):
        with progress.task(f"writing {name}"):
            model = translate(program, name.removesuffix(".onnx"))
            bind_weights(model, program.weights, files)
            ir.save(model, folder / name)


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files beside the graphs."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copy(Path(tokenizer) / name, folder / name)


def describe(folder: Path, target: nn.Module, draft: nn.Module | None, method: Method | None, weights: str) -> Bundle:
    """What the runtime must know, and fingerprints of what was exported."""
    import onnx_ir as ir

    from specpass.passes.pipeline import fingerprint as of_passes

    config = target.config.get_text_config(decoder=True)
    generation = target.generation_config
    eos = eos_ids(generation)
    pad = generation.pad_token_id if generation.pad_token_id is not None else (eos[0] if eos else 0)
    shapes = {value.name: value for value in ir.load(folder / DECODE).graph.inputs}
    kv = []
    for layer in range(config.num_hidden_layers):
        key, value = (shapes[f"past.{layer}.{part}"] for part in ("key", "value"))
        kv.append((key.shape[1], key.shape[3], value.shape[3]))
    budgets = () if method is None else method.layer_budgets(len(kv))
    if method is not None and method.spread != "uniform":  # the most that one head may have
        kept = {value.name: value.shape for value in ir.load(folder / PREFILL).graph.outputs}
        budgets = tuple(kept[f"positions.{layer}"][2] for layer in range(len(kv)))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    return Bundle(
        method="none" if method is None else method.key,
        budgets=budgets,
        kv=tuple(kv),
        dtype=str(key.dtype.numpy()),
        weights=weights,
        compressed=method is not None and method.prompt is not None,
        lookahead=0 if method is None else method.look_ahead(),
        context=None if draft is None else context_length(draft.config),
        eos_ids=eos,
        pad_id=int(pad),
        vocab=config.vocab_size,
        repetition_penalty=float(getattr(generation, "repetition_penalty", None) or 1.0),
        files=files,
        fingerprints={
            "passes": of_passes(),
            "target": fingerprint(target),
            **({} if draft is None else {"draft": fingerprint(draft)}),
        },
        made_with={"specpass": __version__}
        | {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "onnx", "onnxruntime")
            if importlib.util.find_spec(name)
        },
    )


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's config and of its weights' names and shapes."""
    shapes = [f"{name} {tuple(param.shape)} {param.dtype}" for name, param in model.named_parameters()]
    text = "\n".join([type(model).__name__, model.config.to_json_string(use_diff=False), *shapes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
