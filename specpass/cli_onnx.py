"""`specpass generate --onnx`: answer from an exported folder, without torch and transformers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from specpass.errors import OnnxMissingError, PromptError


def generate(folder: Path, text: str, raw: bool, as_json: bool, max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
    """Answer `text` from an exported folder; the answer streams unless `as_json`.

    Raises: what specpass.runtime raises; PromptError: no tokenizer files beside, or no chat template.
    """
    from specpass import runtime

    start = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    model = runtime.load(folder)
    ids = encode(tokenizer, folder, text, raw)
    loaded = time.perf_counter()
    found: list[int] = []
    shown, first = "", None
    interrupted = False
    try:
        for _, token in model.stream([ids], max_new_tokens, **sampling):
            first = first or time.perf_counter()
            found.append(token)
            whole = tokenizer.decode(found, skip_special_tokens=True)
            if not as_json and whole.startswith(shown) and not whole.endswith("\N{REPLACEMENT CHARACTER}"):
                typer.echo(whole[len(shown) :], nl=False)
                shown = whole
    except KeyboardInterrupt:
        interrupted = True
    whole = tokenizer.decode(found, skip_special_tokens=True)
    if not as_json:
        typer.echo(whole[len(shown) :])
    return {
        "text": whole,
        "token_ids": found,
        "stopped": "interrupt" if interrupted else "eos" if found and found[-1] in model.bundle.eos_ids else "length",
        "onnx": str(folder),
        "method": model.bundle.method,
        "prompt_tokens": len(ids),
        "new_tokens": len(found),
        "kv_bytes": None if model.state is None else model.state.cache_bytes,
        "seconds": {
            "load": round(loaded - start, 3),
            "first_token": round(first - loaded, 3) if first else None,
            "total": round(time.perf_counter() - start, 3),
        },
    }


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers` tokenizer beside an export; torch and transformers are not needed.

    Raises: PromptError, OnnxMissingError
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise OnnxMissingError(
            "texts need the tokenizers package: pip install tokenizers, or call specpass.runtime.load with token ids."
        ) from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        from specpass.bundle import read_bundle

        read_bundle(folder)  # a wrong folder is named first
        raise PromptError(
            f"{folder} holds no tokenizer.json: pass tokenizer= to export_onnx, or call "
            "specpass.runtime.load with token ids."
        )
    return Tokenizer.from_file(str(file))


def encode(tokenizer: Any, folder: Path, text: str, raw: bool) -> list[int]:
    """Token ids of the prompt, as a user's message in the chat template unless `raw`.

    Raises: PromptError: there is no chat template.
    """
    if raw:
        return list(tokenizer.encode(text).ids)
    template, special = read_template(folder)
    if template is None:
        raise PromptError("the export's tokenizer has no chat template: pass --raw to feed the prompt as it is.")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise PromptError(f"the chat template refuses this prompt: {message}")

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    world.globals["raise_exception"] = fail
    chat = world.from_string(template).render(
        messages=[{"role": "user", "content": text}], add_generation_prompt=True, **special
    )
    return list(tokenizer.encode(chat, add_special_tokens=False).ids)


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template and the special tokens that it may name."""
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    return template, special
