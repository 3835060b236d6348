"""`specpass generate --onnx`: answer from an exported folder, without torch and transformers."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import typer

from specpass.observe import progress
from specpass.runtime.chat import encode, load_tokenizer


def generate(folder: Path, text: str, raw: bool, as_json: bool, max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
    """Answer `text` from an exported folder; the answer streams unless `as_json`.

    Raises: what specpass.runtime raises; PromptError: no tokenizer files beside, or no chat template.
    """
    from specpass import runtime

    start = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    with progress.task(f"loading {folder.name}"):
        model = runtime.load(folder)
    ids = encode(tokenizer, folder, text, raw)
    loaded = time.perf_counter()
    found: list[int] = []
    shown, first = "", None
    interrupted = False
    try:
        stream = model.stream([ids], max_new_tokens, **sampling)
        with progress.task(progress.READING):
            head = list(itertools.islice(stream, 1))
        for _, token in itertools.chain(head, stream):
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
