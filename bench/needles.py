"""Seeded long-context lookups in the manner of RULER (arXiv 2404.06654): pure Python and a tokenizer.

single      one needle in a haystack of filler sentences
multikey    every line is a needle; one of them is asked for (the hard one for a pruned cache)
multiquery  every line is a needle; four of them are asked for
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from specpass.benchmarks.tasks.vocabulary import ADJECTIVES, NOUNS

KINDS = ("single", "multikey", "multiquery")
QUERIES = 4

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")

INTRO = "Some special magic numbers are hidden within the following text. Memorize them: I will ask about them."


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with its context; `ids` come from the chat template, generation prompt included."""

    kind: str
    seed: int
    text: str
    ids: list[int]
    answers: tuple[str, ...]


def make_prompt(kind: str, seed: int, tokens: int, tokenizer: Any) -> Prompt:
    """A prompt of about `tokens` tokens (within 2 %, or half a line of text where that is more).

    Args:
        kind: one of `KINDS`.
        seed: decides keys, numbers, order and question.
        tokenizer: has a chat template.

    Raises:
        ValueError: an unknown kind, or a length too short for the question.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {KINDS}.")

    def at(lines: int) -> Prompt:
        text, answers = _text(kind, seed, lines)
        return Prompt(kind, seed, text, _chat_ids(tokenizer, text), answers)

    least = QUERIES if kind == "multiquery" else 1
    low, high = least, least + 1
    while len(at(high).ids) < tokens:
        low, high = high, 2 * high
    while high - low > 1:  # len(at(low)) <= tokens <= len(at(high))
        middle = (low + high) // 2
        low, high = (middle, high) if len(at(middle).ids) <= tokens else (low, middle)
    best = min(at(low), at(high), key=lambda prompt: abs(len(prompt.ids) - tokens))
    if len(best.ids) > 1.5 * tokens:
        raise ValueError(f"tokens={tokens} is too short for a {kind} question ({len(best.ids)} tokens at least).")
    return best


def score(answer: str, answers: Sequence[str]) -> float:
    """Share of the expected numbers that the answer holds as whole numbers."""
    said = set(re.findall(r"\d+", answer))
    return sum(expected in said for expected in answers) / len(answers)


def _chat_ids(tokenizer: Any, text: str) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _text(kind: str, seed: int, lines: int) -> tuple[str, tuple[str, ...]]:
    """(prompt text of `lines` lines, expected numbers). Fewer lines are a prefix of the same needles."""
    rng = random.Random(f"{kind}-{seed}")
    keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(keys)
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), len(keys))]
    depth = rng.random()  # drawn before anything that depends on the length, so that lengths compare
    needles = [f"One of the special magic numbers for {k} is: {n}." for k, n in zip(keys, numbers, strict=True)]
    if kind == "single":
        body = [FILLER[i % len(FILLER)] for i in range(lines)]
        body.insert(int(depth * lines), needles[0])
        asked, separator = [0], " "
    else:
        if lines > len(keys):
            raise ValueError(f"{lines} needles wanted, {len(keys)} keys known.")
        body, separator = needles[:lines], "\n"
        asked = [int(depth * lines)] if kind == "multikey" else sorted(rng.sample(range(lines), QUERIES))
    names = ", ".join(keys[i] for i in asked)
    if len(asked) == 1:
        question = f"What is the special magic number for {names} mentioned in the text above?"
        form = "Answer with the number only."
    else:
        question = f"What are the special magic numbers for {names} mentioned in the text above?"
        form = "Answer with the numbers only, separated by commas."
    text = f"{INTRO}\n\n{separator.join(body)}\n\n{question} {form}"
    return text, tuple(numbers[i] for i in asked)
