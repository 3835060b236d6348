"""A prompt of a wished length: a task writes a question of `count` units of haystack, the most that fit are taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

from specpass.errors import BenchmarkError


@dataclasses.dataclass(frozen=True)
class Question:
    """What the user says, how the answer begins, and what belongs into it."""

    user: str
    prefix: str
    expected: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question as token ids, chat template and the answer's beginning included; `length` is what was wished for."""

    task: str
    seed: int
    length: int
    text: str
    ids: tuple[int, ...]
    expected: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of text and token ids: equal prompts have equal digests."""
        return hashlib.sha256(json.dumps([self.text, self.ids]).encode()).hexdigest()[:16]


def fit(task: str, seed: int, length: int, tokenizer: Any, write: Callable[[int], Question | None]) -> Prompt:
    """The longest prompt of at most `length` tokens.

    Args:
        write: units of haystack -> the question, None where there are no more units.

    Raises: BenchmarkError: `length` holds no question of this task, or there is too little text to fill it.
    """

    def at(count: int) -> Prompt | None:
        question = write(count)
        if question is None:
            return None
        text = render(tokenizer, question)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return Prompt(task, seed, length, text, ids, question.expected)

    def fits(prompt: Prompt | None) -> bool:
        return prompt is not None and len(prompt.ids) <= length

    low, high, best = 1, 2, at(1)
    if best is None or not fits(best):
        least = "" if best is None else f" ({len(best.ids)} tokens at least)"
        raise BenchmarkError(f"length {length} is too short for a prompt of {task}{least}: raise --lengths.")
    found = at(high)
    while found is not None and fits(found):
        low, high, best = high, 2 * high, found
        found = at(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if found is not None and fits(found):
            low, best = middle, found
        else:
            high = middle
    if at(low + 1) is None:
        raise BenchmarkError(f"there is too little text for a prompt of {task} with {length} tokens: lower --lengths.")
    return best


def render(tokenizer: Any, question: Question) -> str:
    """The chat template's text with the answer's beginning; the plain text where the tokenizer has no template."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{question.user}\n{question.prefix}"
    chat = [{"role": "user", "content": question.user}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + question.prefix
