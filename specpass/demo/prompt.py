"""The demo's prompt: source code of Python's standard library with one line put into it, and a question about it."""

from __future__ import annotations

import dataclasses
import heapq
import inspect
import textwrap
from typing import Any

# A value much longer than the pooling kernel: its far end looks nothing like the question, so that the question's own
# rows (SnapKV) do not find it, while a lookahead that copies the value attends to all of it.
EXPECTED = "9f3c71d2-5be8-4a06-b1d4-27e6c8503afd"
FACT = f'BACKUP_KEY = "{EXPECTED}"'
QUESTION = "What is the value of BACKUP_KEY in the source above? Answer with the value only."


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Model inputs [1, S], the S tokens as text, and the tokens [answer.start, answer.stop) that hold the answer."""

    inputs: Any
    tokens: tuple[str, ...]
    answer: range

    def __len__(self) -> int:
        return len(self.tokens)


def build_prompt(tokenizer: Any, tokens: int, depth: float = 0.4) -> Prompt:
    """The longest chat prompt of at most `tokens` tokens; the fact is the first unindented line behind `depth`."""
    lines = "".join(inspect.getsource(module) for module in (textwrap, heapq)).splitlines()

    def text(count: int) -> str:
        at = int(count * depth)
        while at < count and (not lines[at] or lines[at][0].isspace()):
            at += 1  # a constant belongs before a line without indentation
        source = "\n".join([*lines[:at], FACT, "", *lines[at:count]])
        chat = [{"role": "user", "content": f"```python\n{source}\n```\n\n{QUESTION}"}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def encode(count: int) -> Any:
        return tokenizer(text(count), add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")

    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        fits = encode(middle)["input_ids"].shape[1] <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    inputs, whole = encode(low), text(low)
    spans = inputs.pop("offset_mapping")[0].tolist()
    start = whole.index(EXPECTED)
    inside = [i for i, (a, b) in enumerate(spans) if a < start + len(EXPECTED) and b > start]
    # A token is shown with the text up to the next one, so that the tokens together are the prompt.
    ends = [*(a for a, _ in spans[1:]), len(whole)]
    pieces = tuple(whole[a:end] for (a, _), end in zip(spans, ends, strict=True))
    return Prompt(inputs, pieces, range(inside[0], inside[-1] + 1))
