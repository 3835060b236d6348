"""A prompt of a wished length: a task writes a question of `count` units of haystack, the most that fit are taken."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
from collections.abc import Callable
from typing import Any

from specpass.errors import BenchmarkError


@dataclasses.dataclass(frozen=True)
class Question:
    """What the user says (a context, then what is asked of it), how the answer begins, and what belongs into it."""

    context: str
    ask: str
    prefix: str
    expected: tuple[str, ...]

    @property
    def user(self) -> str:
        return self.context + self.ask


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question as token ids, chat template and the answer's beginning included; `length` is what was wished for.

    `context` tokens stand in front of what is asked; they are all that a compressor sees where that is `agnostic`.
    """

    task: str
    seed: int
    length: int
    text: str
    ids: tuple[int, ...]
    expected: tuple[str, ...]
    context: int = 0
    agnostic: bool = False

    @property
    def seen(self) -> int:
        """Tokens that a compressor sees."""
        return self.context if self.agnostic else len(self.ids)

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
        return Prompt(task, seed, length, text, encoded(text), question.expected)

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

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
    question = write(low)
    assert question is not None
    before = encoded(best.text[: best.text.rindex(question.ask)])  # its last tokens may be others with the question
    alike = itertools.takewhile(bool, map(operator.eq, before, best.ids))
    return dataclasses.replace(best, context=sum(alike))


def render(tokenizer: Any, question: Question) -> str:
    """The chat template's text with the answer's beginning; the plain text where the tokenizer has no template."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{question.user}\n{question.prefix}"
    chat = [{"role": "user", "content": question.user}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + question.prefix
