"""Cases: drawn from a seed and a number, grouped by the model that they call, shrunk when they fail."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "gpt2", "phi", "mixtral", "gpt_oss", "stablelm")
# name -> (class, arguments besides the budget); budgets are 24 and, where prompts fit, 72
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "speckv": ("SpecKV", {"window": 8, "lookahead": 4}),
    "speckv-mean": ("SpecKV", {"window": 5, "lookahead": 7, "reduce": "mean", "pool": "avg", "kernel": 3}),
    "snapkv": ("SnapKV", {"window": 8}),
    "streamingllm": ("StreamingLLM", {}),
    "specpc": ("SpecPC", {"window": 8, "lookahead": 2, "kernel": 5, "neighbours": 4}),
    "speckv-pc": (
        "SpecKVPC",
        {"window": 6, "lookahead": 3, "prompt_budget": 30, "prompt_window": 8, "prompt_kernel": 5, "neighbours": 3},
    ),
}
BUDGETS = (24, 72)
LENGTHS = (2, 5, 9, 23, 24, 25, 26, 31, 40, 47, 60, 71)
LONGEST_ANSWER = 70  # beyond the 64 slots of room


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `generate`, or several with one cache.

    Args:
        lengths: of the prompts, padded on the left where they differ.
        turns: (tokens cropped off the cache, tokens appended) in front of each further answer.
        reset: the cache is reset then, and reads another prompt.
        returned: num_return_sequences.
    """

    index: int
    family: str
    method: str
    budget: int
    lengths: tuple[int, ...]
    new: int = 4
    mode: str = "greedy"
    returned: int = 1
    early_exit: bool = True
    eos: bool = False
    stop: bool = False
    stream: bool = False
    turns: tuple[tuple[int, int], ...] = ()
    reset: bool = False

    @property
    def subject(self) -> tuple[str, str, int]:
        """What is compiled once for all cases that share it."""
        return self.family, self.method, self.budget

    @property
    def beams(self) -> int:
        return 3 if "beam" in self.mode else 1

    @property
    def text(self) -> str:
        """The case as Python."""
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"Case({', '.join(shown)})"


def draw(seed: int, index: int, families: tuple[str, ...] = FAMILIES, methods: tuple[str, ...] = ()) -> Case:
    """The case of that number."""
    dice = random.Random(f"{seed}/{index}")
    mode = dice.choice(("greedy",) * 5 + ("sample", "sample", "beam", "beam sample"))
    rows = dice.choice((1, 1, 1, 2, 3))
    lengths = tuple(dice.choice(LENGTHS) for _ in range(rows))
    case = Case(
        index,
        dice.choice(families),
        dice.choice(methods or tuple(METHODS)),
        dice.choice((BUDGETS[0], BUDGETS[0], BUDGETS[1])),
        lengths,
        new=LONGEST_ANSWER if dice.random() < 0.02 else dice.choice((1, 2, 3, 5, 8)),
        mode=mode,
        early_exit=dice.random() < 0.7,
        eos=dice.random() < 0.15,
        stop=dice.random() < 0.1,
    )
    if mode == "greedy" and dice.random() < 0.3 and case.new > 1 and not case.eos and not case.stop:
        turns = [(dice.choice((0, 0, 1, case.new - 1)), dice.choice((1, 2, 6))) for _ in range(dice.choice((1, 2)))]
        return dataclasses.replace(case, turns=tuple(turns), reset=dice.random() < 0.2)
    if mode != "greedy":
        return dataclasses.replace(case, returned=dice.choice((1, 2, 3)))
    return dataclasses.replace(case, stream=rows == 1 and dice.random() < 0.3, reset=dice.random() < 0.1)


def grouped(seed: int, count: int, **choice: Any) -> list[Case]:
    """Cases 0 .. count - 1, those of one compiled model together."""
    return sorted((draw(seed, index, **choice) for index in range(count)), key=lambda case: (case.subject, case.index))


def shrunk(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The simplest case that still fails: each step leaves out one thing."""
    for smaller in _simpler(case):
        if fails(smaller):
            return shrunk(smaller, fails)
    return case


def _simpler(case: Case) -> Iterator[Case]:
    plain = Case(case.index, case.family, case.method, case.budget, case.lengths)
    for field in ("reset", "turns", "stop", "eos", "stream", "returned", "mode", "early_exit"):
        if getattr(case, field) != getattr(plain, field) and not (field == "mode" and case.returned > 1):
            yield dataclasses.replace(case, **{field: getattr(plain, field)})
    if len(case.turns) > 1:
        yield dataclasses.replace(case, turns=case.turns[:1])
    if len(case.lengths) > 1:
        for row in range(len(case.lengths)):
            yield dataclasses.replace(case, lengths=case.lengths[:row] + case.lengths[row + 1 :])
    if case.new > 2 and not case.turns:
        yield dataclasses.replace(case, new=case.new // 2)
    for row, length in enumerate(case.lengths):
        for simple in (25, 9):
            if length > simple:
                yield dataclasses.replace(case, lengths=(*case.lengths[:row], simple, *case.lengths[row + 1 :]))
