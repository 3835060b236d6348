"""The demo: one long prompt with a fact in it, and what full KV and each method make of it, side by side.

Methods run one after the other, compiled, at the same budget; what each kept becomes a picture and a page.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

import specpass
from specpass import hub
from specpass.backend import checks
from specpass.demo.prompt import Prompt, build_prompt
from specpass.demo.result import Result, kept_positions, table
from specpass.files import check_folder
from specpass.methods import registry
from specpass.methods.base import Method
from specpass.observe.storage import cache_bytes
from specpass.observe.streaming import Clock

DRAFT, TARGET = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
METHODS = ("snapkv", "speckv", "specpc", "speckvpc")
OPTIONS = {"window": 32, "lookahead": 32, "prompt_budget": 1024}  # where a method has them
WARM_UP_TOKENS = 256  # graphs serve every length beyond the budget: a short prompt compiles for a long one
WARM_UP_NEW = 3  # the second token compiles decode; rooms come in blocks of 64 slots, so it serves NEW_TOKENS too
NEW_TOKENS = 48

_LOG = Console(stderr=True)


def demo_methods(budget: int) -> list[Method]:
    """METHODS and the user's own, at one budget; of the latter, what cannot be loaded is left out with a warning."""
    classes = [registry.method_class(name) for name in METHODS]
    classes += [cls for name in registry.own_names() if (cls := registry.own_class(name)) is not None]
    return [cls(**{"budget": budget, **registry.fields_of(cls, OPTIONS)}) for cls in classes]


def measure(name: str, model: Any, tokenizer: Any, prompt: Prompt, warm_up: Prompt | None) -> Result:
    """Generate once and time it; a ``warm_up`` prompt is run before, and its time counts as compile time."""
    compile_s = None
    if warm_up is not None:
        _LOG.print(f"{name}: compiling")
        start = time.perf_counter()
        _generate(model, warm_up.inputs, max_new_tokens=WARM_UP_NEW)
        compile_s = time.perf_counter() - start
    _LOG.print(f"{name}: reading {len(prompt):,} tokens, then answering")
    clock = Clock()
    start = time.perf_counter()
    out = _generate(model, prompt.inputs, max_new_tokens=NEW_TOKENS, streamer=clock)
    times = clock.times[1:]
    span = times[-1] - times[0]
    kept = kept_positions(out.past_key_values)
    return Result(
        method=name,
        answer=tokenizer.decode(out.sequences[0, len(prompt) :], skip_special_tokens=True),
        slots=len(prompt) if kept is None else max(len(head) for layer in kept for head in layer),
        cache_bytes=cache_bytes(out.past_key_values),
        first_token_s=times[0] - start,
        decode_rate=(len(times) - 1) / span if span > 0 else float("nan"),
        compile_s=compile_s,
        kept=kept,
    )


@torch.no_grad()
def _generate(model: Any, inputs: Any, **options: Any) -> Any:
    gc.collect()  # the cache of the run before must not count in this one's memory
    return model.generate(
        **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, return_dict_in_generate=True, **options
    )


def run(
    budget: int = 128,
    tokens: int = 4000,
    *,
    target: str = TARGET,
    draft: str = DRAFT,
    dtype: str = "bfloat16",
    lowering: str = "inductor",
    out: Path | None = None,
) -> list[Result]:
    """Load the pair, run full KV and the methods one after the other, print the table; returns its rows.

    Args:
        budget: KV slots C per KV head and layer, above the window of 32.
        tokens: prompt length S.
        target, draft: models by name, hub id or folder.
        out: folder for kept.png and kept.html; None draws nothing.

    Raises: what `specpass.hub.load`, `specpass.compile` and `specpass.files.write_file` raise; wrong names, unlike
    tokenizers and a folder that cannot be written to before anything is loaded.
    """
    methods = demo_methods(budget)
    if out is not None:
        check_folder(out)
    hub.prepare(draft, target)
    checks.check_tokenizers(hub.read_config(target), hub.read_config(draft))  # before minutes of work, not after
    logging.disable_progress_bar()  # a line for each step is enough
    _LOG.print(f"loading {draft} (draft) and {target} (target)")
    small, tokenizer = hub.load(draft, dtype=dtype)
    model, _ = hub.load(target, dtype=dtype)
    prompt = build_prompt(tokenizer, tokens)
    warm_up = build_prompt(tokenizer, max(WARM_UP_TOKENS, 2 * budget))
    results = [measure("full KV", model, tokenizer, prompt, None)]
    for method in methods:
        specpass.compile(model, draft=small if method.drafts else None, method=method, lowering=lowering)
        try:
            results.append(measure(f"{method.name} {budget}", model, tokenizer, prompt, warm_up))
        finally:
            specpass.restore(model)
    title = f"{target}, draft {draft}, prompt of {len(prompt):,} tokens, {dtype}"
    Console(width=None if sys.stdout.isatty() else 140).print(table(results, title))
    if out is not None:
        from specpass.demo.pictures import draw

        for path in draw(out, results, prompt, title):
            _LOG.print(f"wrote {path}", soft_wrap=True)
    return results
