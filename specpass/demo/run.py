"""The demo: one long prompt with a fact in it, and what full KV and each method make of it, side by side.

Methods run one after the other, compiled, at the same budget; what each kept becomes a picture and a page.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import specpass
from specpass import hub
from specpass.backend import checks
from specpass.demo.prompt import Prompt, build_prompt
from specpass.demo.result import Result, Rows
from specpass.files import check_folder
from specpass.kernels.cpu.isa import multiplies
from specpass.methods import registry
from specpass.methods.base import Method
from specpass.observe import progress
from specpass.observe.kept import kept_positions
from specpass.observe.layers import reading_by_layers
from specpass.observe.storage import cache_bytes
from specpass.observe.streaming import Clock

DRAFT, TARGET = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
METHODS, TOKENS = ("snapkv", "speckv"), 2000  # about three minutes on two cores
ALL_METHODS, ALL_TOKENS = (*METHODS, "specpc", "speckvpc"), 4000  # seven
OPTIONS = {"window": 32, "lookahead": 32, "prompt_budget": 1024}  # where a method has them
ADVICE = "Methods have their papers' options here. What measured best: -m best, or specpass.SpecKV.best(budget)."
WARM_UP_TOKENS = 256  # graphs serve every length beyond the budget: a short prompt compiles for a long one
WARM_UP_NEW = 3  # the second token compiles decode; rooms come in blocks of 64 slots, so it serves NEW_TOKENS too
NEW_TOKENS = 48


def demo_methods(budget: int, names: Sequence[str] = METHODS) -> list[Method]:
    """Methods by name and the user's own, at one budget; of the latter, what cannot be loaded is left out, warning."""
    classes = [(registry.method_class(name), registry.preset(name)) for name in names]
    classes += [(cls, {}) for name in registry.own_names() if (cls := registry.own_class(name)) is not None]
    return [cls(**{"budget": budget, **own, **registry.fields_of(cls, OPTIONS)}) for cls, own in classes]


def measure(name: str, model: Any, tokenizer: Any, prompt: Prompt, warm_up: Prompt | None) -> Result:
    """Generate once and time it; a ``warm_up`` prompt is run before, and its time counts as compile time."""
    compile_s = None
    if warm_up is not None:
        start = time.perf_counter()
        _generate(model, warm_up.inputs, max_new_tokens=WARM_UP_NEW)
        compile_s = time.perf_counter() - start
    clock = Clock()
    start = time.perf_counter()
    with reading_by_layers(model) if warm_up is None else contextlib.nullcontext():
        out = _generate(model, prompt.inputs, max_new_tokens=NEW_TOKENS, streamer=clock)
    cache = out.past_key_values
    kept = kept_positions(cache) if isinstance(cache, specpass.BudgetCache) else None
    return Result(
        method=name,
        answer=tokenizer.decode(out.sequences[0, len(prompt) :], skip_special_tokens=True),
        slots=len(prompt) if kept is None else max(len(head) for layer in kept for head in layer),
        cache_bytes=cache_bytes(cache),
        first_token_s=clock.times[1] - start,
        answer_s=clock.times[-1] - start,
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
    tokens: int = TOKENS,
    *,
    methods: Sequence[str] = METHODS,
    target: str = TARGET,
    draft: str = DRAFT,
    dtype: str | None = None,
    lowering: str = "inductor",
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> list[Result]:
    """Load the pair, run full KV and the methods one after the other, print each one's row; returns the rows.

    Args:
        budget: KV slots C per KV head and layer, above the window of 32.
        tokens: prompt length S.
        methods: by name; the user's own follow.
        target, draft: models by name, hub id, folder or GGUF file.
        dtype: of both models; None: bfloat16, or float32 on a CPU that has no instructions for it.
        out: folder for kept.png and kept.html; None draws nothing.
        trust_remote_code: code that the models bring along may run.

    Raises: what `specpass.hub.load`, `specpass.compile` and `specpass.files.write_file` raise; wrong names, unlike
    tokenizers and a folder that cannot be written to before anything is loaded.
    """
    made = demo_methods(budget, methods)
    if out is not None:
        check_folder(out)
    hub.prepare(draft, target)
    given: Any = {"trust_remote_code": trust_remote_code}
    configs = [hub.read_config(name, **given) for name in (target, draft)]
    checks.check_tokenizers(*configs)  # before minutes of work, not after
    dtype = dtype or ("bfloat16" if multiplies(torch.bfloat16) else "float32")
    small, tokenizer = hub.load(draft, dtype, **given)
    model, _ = hub.load(target, dtype, **given)
    prompt = build_prompt(tokenizer, tokens)
    warm_up = build_prompt(tokenizer, max(WARM_UP_TOKENS, 2 * budget))
    rows = Rows(
        Console(width=None if sys.stdout.isatty() else 140),
        f"{target}, draft {draft}, prompt of {len(prompt):,} tokens, {dtype}",
    )
    count = 1 + len(made)
    with progress.task(f"full KV (1 of {count})"):
        full = measure("full KV", model, tokenizer, prompt, None)
    rows.add(full)
    for number, method in enumerate(made, 2):
        name = f"{method.name} {budget}"
        specpass.compile(model, draft=small if method.needs_draft else None, method=method, lowering=lowering)
        try:
            with progress.task(f"{name} ({number} of {count})"):
                row = measure(name, model, tokenizer, prompt, warm_up)
        finally:
            specpass.restore(model)
        rows.add(row)
    if out is not None:
        from specpass.demo.pictures import draw

        for path in draw(out, rows.rows, prompt, rows.title):
            Console(stderr=True).print(f"wrote {path}", soft_wrap=True)
    Console(stderr=True).print(ADVICE, soft_wrap=True)
    return rows.rows
