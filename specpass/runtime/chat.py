"""Texts for an exported folder: its tokenizer and chat template, without torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specpass.errors import OnnxMissingError, PromptError


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
        from specpass.runtime.bundle import read_bundle

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
