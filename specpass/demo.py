"""The demo: one long prompt with a fact in it, and what full KV, SnapKV and SpecKV make of it, side by side.

The text is source code of Python's standard library, which every machine has; the fact is one inserted line.
"""

from __future__ import annotations

import gc
import heapq
import inspect
import textwrap
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

import specpass
from specpass import hub

DRAFT, TARGET = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
# A value much longer than the pooling kernel: its far end looks nothing like the question, so that the question's own
# rows (SnapKV) do not find it, while a lookahead that copies the value attends to all of it.
EXPECTED = "9f3c71d2-5be8-4a06-b1d4-27e6c8503afd"
FACT = f'BACKUP_KEY = "{EXPECTED}"'
QUESTION = "What is the value of BACKUP_KEY in the source above? Answer with the value only."
WINDOW = LOOKAHEAD = 32
WARM_UP_TOKENS = 512  # graphs serve every length beyond the budget: a short prompt compiles for a long one
NEW_TOKENS = 48

_LOG = Console(stderr=True)


@dataclass(frozen=True)
class Result:
    """One row of the table; times in seconds, ``compile_s`` None where nothing is compiled."""

    method: str
    answer: str
    slots: int
    cache_bytes: int
    first_token_s: float
    decode_rate: float  # tokens per second after the first
    compile_s: float | None

    @property
    def right(self) -> bool:
        return self.answer.strip().strip("\"'`") == EXPECTED


class _Clock(BaseStreamer):
    """Notes when `generate` hands over each token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def build_prompt(tokenizer: Any, tokens: int, depth: float = 0.4) -> Any:
    """The chat prompt as model inputs [1, S], S just below ``tokens``; ``depth`` places the fact in the text."""
    lines = "".join(inspect.getsource(module) for module in (textwrap, heapq)).splitlines()

    def encode(count: int) -> Any:
        at = int(count * depth)
        while at < count and (not lines[at] or lines[at][0].isspace()):
            at += 1  # a constant belongs before a line without indentation
        source = "\n".join([*lines[:at], FACT, "", *lines[at:count]])
        chat = [{"role": "user", "content": f"```python\n{source}\n```\n\n{QUESTION}"}]
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        fits = encode(middle)["input_ids"].shape[1] <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return encode(low)


def cache_bytes(cache: Any) -> int:
    """Bytes of the distinct storages reachable from a cache and its layers."""
    storages: dict[int, int] = {}
    stack: list[Any] = [cache, *cache.layers]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            stack += [part for part in item if isinstance(part, torch.Tensor | list | tuple | dict)]
        elif isinstance(item, dict):
            stack += [part for part in item.values() if isinstance(part, torch.Tensor | list | tuple | dict)]
        elif hasattr(item, "__dict__"):
            stack.append(vars(item))
    return sum(storages.values())


def measure(name: str, model: Any, tokenizer: Any, inputs: Any, warm_up: Any | None) -> Result:
    """Generate once and time it; a ``warm_up`` prompt is run before, and its time counts as compile time."""
    compile_s = None
    if warm_up is not None:
        _LOG.print(f"{name}: compiling")
        start = time.perf_counter()
        _generate(model, warm_up, max_new_tokens=NEW_TOKENS)  # the same room, so that decode is compiled once
        compile_s = time.perf_counter() - start
    _LOG.print(f"{name}: reading {inputs['input_ids'].shape[1]:,} tokens, then answering")
    clock = _Clock()
    start = time.perf_counter()
    out = _generate(model, inputs, max_new_tokens=NEW_TOKENS, streamer=clock)
    prompt = inputs["input_ids"].shape[1]
    times = clock.times[1:]
    span = times[-1] - times[0]
    positions = getattr(out.past_key_values.layers[0], "positions", None)
    return Result(
        method=name,
        answer=tokenizer.decode(out.sequences[0, prompt:], skip_special_tokens=True),
        slots=prompt if positions is None else int((positions[0, 0] >= 0).sum()),
        cache_bytes=cache_bytes(out.past_key_values),
        first_token_s=times[0] - start,
        decode_rate=(len(times) - 1) / span if span > 0 else float("nan"),
        compile_s=compile_s,
    )


@torch.no_grad()
def _generate(model: Any, inputs: Any, **options: Any) -> Any:
    gc.collect()  # the cache of the run before must not count in this one's memory
    return model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **options)


def run(budget: int = 128, tokens: int = 3000) -> list[Result]:
    """Fetch the pair, run the three methods one after the other and print the table; returns its rows.

    Args:
        budget: KV slots C per KV head and layer, above the window of 32.
        tokens: prompt length S.

    Raises what `specpass.hub.load` and `specpass.compile` raise.
    """
    methods = (
        specpass.SnapKV(budget=budget, window=WINDOW),
        specpass.SpecKV(budget=budget, window=WINDOW, lookahead=LOOKAHEAD),
    )
    _LOG.print(f"loading {DRAFT} (draft) and {TARGET} (target)")
    draft, tokenizer = hub.load(DRAFT, dtype=torch.bfloat16)
    target, _ = hub.load(TARGET, dtype=torch.bfloat16)
    inputs = build_prompt(tokenizer, tokens)
    warm_up = build_prompt(tokenizer, max(WARM_UP_TOKENS, 2 * budget))
    results = [measure("full KV", target, tokenizer, inputs, None)]
    for method in methods:
        specpass.compile(target, draft=draft if method.drafts else None, method=method)
        try:
            results.append(measure(f"{method.name} {budget}", target, tokenizer, inputs, warm_up))
        finally:
            specpass.restore(target)
    Console().print(_table(results, inputs["input_ids"].shape[1]))
    return results


def _table(results: list[Result], prompt: int) -> Table:
    table = Table(title=f"{TARGET}, draft {DRAFT}, prompt of {prompt:,} tokens, bfloat16")
    for column in ("method", "answer", ""):
        table.add_column(column)
    for column in ("slots per\nKV head", "KV MiB", "first\ntoken s", "decode\ntokens/s", "compile s"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row.method,
            row.answer,
            "[green]right[/green]" if row.right else "[red]wrong[/red]",
            f"{row.slots:,}",
            f"{row.cache_bytes / 2**20:.1f}",
            f"{row.first_token_s:.1f}",
            f"{row.decode_rate:.1f}",
            "-" if row.compile_s is None else f"{row.compile_s:.0f}",
        )
    table.caption = f"the fact: {FACT}"
    return table
