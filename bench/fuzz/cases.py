"""Cases: drawn from a seed and a number, grouped by the model that they call, shrunk when they fail."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "gpt2", "phi", "mixtral", "gpt_oss", "stablelm"),
    "lfm2",  # its convolutions have a state
)
UNTURNED = ("gpt2", "lfm2")  # no graph says how positions turn their queries
RECURRENT = ("lfm2",)  # states cannot be cropped, and no graph goes on from them
# name -> (class, arguments besides the budget)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "speckv": ("SpecKV", {"window": 8, "lookahead": 4}),
    "speckv-mean": ("SpecKV", {"window": 5, "lookahead": 7, "reduce": "mean", "pool": "avg", "kernel": 3}),
    "speckv-ngram": ("SpecKV", {"window": 8, "lookahead": "ngram"}),
    "snapkv": ("SnapKV", {"window": 8}),
    "pyramidkv": ("PyramidKV", {"window": 8, "beta": 4}),
    "streamingllm": ("StreamingLLM", {}),
    "specpc": ("SpecPC", {"window": 8, "lookahead": 2, "kernel": 5, "neighbours": 4}),
    "speckv-pc": (
        "SpecKVPC",
        {"window": 6, "lookahead": 3, "prompt_budget": 30, "prompt_window": 8, "prompt_kernel": 5, "neighbours": 3},
    ),
}
# name -> the same, of methods whose KV heads share budgets or whose scores weigh values: drawn where they are asked for
SPREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "speckv-heads": ("SpecKV", {"window": 8, "lookahead": 4, "spread": "heads"}),
    "speckv-global": ("SpecKV", {"window": 8, "lookahead": 4, "spread": "global", "value_norms": True}),
    "speckv-best": ("SpecKV", {"window": 8, "lookahead": 4, "spread": "global", "reconstruction": True}),
    "speckv-moves": (
        "SpecKV",
        {"window": 5, "lookahead": 7, "reduce": "mean", "pool": "avg", "kernel": 3, "reconstruction": True},
    ),
    "snapkv-heads": ("SnapKV", {"window": 8, "spread": "heads", "reconstruction": True}),
    "snapkv-norms": ("SnapKV", {"window": 8, "value_norms": True}),
}
CHOOSERS = ("specpc", "speckv-pc")  # of what the target reads: no turn can choose among what was never read
UNWATCHED = ("gpt_oss",)  # its attention is no scaled_dot_product_attention, and its own forward is not pruned
# With a draft that can go on.
DRAFTED = ("speckv", "speckv-mean", *CHOOSERS, *(name for name in SPREAD if "speckv" in name))
PLACES = ("device", "cpu", "file")  # of a document that was read beforehand
DOCUMENTS = (1, 3, 20, 39, 58)  # tokens
OWN_DRAFT = ("speckv-mean", "speckv-moves")  # their draft is the target's twin, whose lookahead the answer follows
BUDGETS = (24, 24, 72, 0.5)  # prompts of up to 64 tokens, padding included, are kept by a ratio; and 72 keeps all
LENGTHS = (2, 5, 9, 23, 24, 25, 26, 31, 40, 47, 60, 71)
LONGEST_ANSWER = 70  # beyond the 64 slots of room


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `generate`, or several with one cache.

    Args:
        lengths: of the prompts, padded on the left where they differ.
        mode: "assisted" and "lookup" are greedy, with candidates of another model and of the prompt.
        turns: (tokens cropped off the cache, tokens appended) in front of each further answer.
        ragged: what is appended is padded on the left: row i has i tokens fewer, one at least.
        reset: the cache is reset then, and reads another prompt.
        returned: num_return_sequences.
        dropped: what the cache drops is held, and each turn is a prompt of the whole conversation.
        bits: of the prompt's slots.
        prefix: where a document lies that was read beforehand, and its tokens, with which each of the prompts begins.
        resampled: sequences of each prompt, and steps of direct calls until they are chosen anew (particles).
        generated: slots of the answer's tokens; evict: which stay; shared: in one budget with the prompt's.
    """

    index: int
    family: str
    method: str
    budget: int | float
    lengths: tuple[int, ...]
    new: int = 4
    mode: str = "greedy"
    returned: int = 1
    early_exit: bool = True
    eos: bool = False
    stop: bool = False
    stream: bool = False
    turns: tuple[tuple[int, int], ...] = ()
    ragged: bool = False
    reset: bool = False
    dropped: bool = False
    bits: int | None = None
    prefix: tuple[str, int] | None = None
    resampled: tuple[int, int] | None = None
    generated: int | None = None
    evict: str = "recent"
    shared: bool = False

    @property
    def subject(self) -> tuple[str, str, int | float]:
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


def draw(
    seed: int,
    index: int,
    families: tuple[str, ...] = FAMILIES,
    methods: tuple[str, ...] = (),
    bits: tuple[int | None, ...] = (None,),
    policies: tuple[str, ...] = (),
    turns: bool = False,
    prefix: bool = False,
    resample: bool = False,
) -> Case:
    """The case of that number.

    Args:
        bits: of which its cache has some. policies: of which one says what is evicted, of long answers.
        turns: it has some, and they choose among all of the conversation (`dropped`), where that can be had.
        prefix: its prompts begin with a document that was read beforehand, where that can be had.
        resample: in place of an answer, sequences that are chosen anew; their answers are not bounded.
    """
    case = _drawn(seed, index, families, methods)
    step = any(crop and fresh == 1 for crop, fresh in case.turns)  # one token behind a crop is no turn
    if turns and not case.turns and case.mode not in ("assisted", "lookup"):
        plain: dict[str, Any] = {"mode": "greedy", "returned": 1, "stream": False, "eos": False, "stop": False}
        case = dataclasses.replace(case, turns=((0, 2 + index % 5),), new=max(case.new, 2), **plain)
    goes_on = case.method not in CHOOSERS and case.family not in (*RECURRENT, *UNWATCHED)  # from what was read
    held = goes_on and not step and case.mode not in ("assisted", "lookup")
    often = 1.0 if turns else 0.5 if case.turns else 0.1
    if held and random.Random(f"{seed}/{index}/dropped").random() < often:
        case = dataclasses.replace(case, dropped=True)
    case = dataclasses.replace(case, bits=random.Random(f"{seed}/{index}/bits").choice(bits))
    if prefix and goes_on:
        case = _behind(case, random.Random(f"{seed}/{index}/prefix"))
    if resample:
        return _resampled(case, random.Random(f"{seed}/{index}/resample"))
    return _bounded(case, random.Random(f"{seed}/{index}/evict"), policies) if policies else case


def _behind(case: Case, dice: random.Random) -> Case:
    """The case with a document in front of its questions, of which each has one token at least."""
    tokens = dice.choice(DOCUMENTS)
    longer = [tokens + dice.choice((1, 2, 6, 12)) for _ in case.lengths]
    lengths = tuple(own if own > tokens else other for own, other in zip(case.lengths, longer, strict=True))
    mode = case.mode if case.mode not in ("assisted", "lookup") else "greedy"  # no assistant has read it
    return dataclasses.replace(case, prefix=(dice.choice(PLACES), tokens), lengths=lengths, mode=mode)


def _resampled(case: Case, dice: random.Random) -> Case:
    """The case's prompts, with several sequences behind each that are fed token by token."""
    plain: dict[str, Any] = {"mode": "greedy", "returned": 1, "stream": False, "eos": False, "stop": False}
    how = dice.choice((2, 3, 5)), dice.choice((1, 2, 3))
    return dataclasses.replace(case, **plain, turns=(), ragged=False, new=dice.choice((3, 6, 9)), resampled=how)


def _bounded(case: Case, dice: random.Random, policies: tuple[str, ...]) -> Case:
    """The case with a long answer whose tokens are evicted, in one sequence for each row."""
    if case.family in UNTURNED:
        policies = tuple(policy for policy in policies if policy != "triattention")
    if case.family in RECURRENT or case.method not in DRAFTED:
        policies = tuple(policy for policy in policies if policy != "lookahead")
    if case.method == "speckv-ngram" or not policies:  # its lookahead is as long as its answer
        return case
    plain: dict[str, Any] = {"mode": "greedy", "returned": 1} if case.mode not in ("greedy", "sample") else {}
    crops = tuple((min(crop, 1), fresh) for crop, fresh in case.turns)
    how: dict[str, Any] = {
        "generated": dice.choice((12, 16)),
        "evict": dice.choice(policies),
        "shared": dice.random() < 0.5,
    }
    how["shared"] = how["shared"] and case.bits is None
    return dataclasses.replace(
        case, **plain, **how, turns=crops, new=dice.choice((14, 20, 31)), eos=False, stop=False, stream=False
    )


def _drawn(seed: int, index: int, families: tuple[str, ...], methods: tuple[str, ...]) -> Case:
    dice = random.Random(f"{seed}/{index}")
    family, method = dice.choice(families), dice.choice(methods or tuple(METHODS))
    rows = dice.choice((1, 1, 1, 2, 3))
    alone = ("lookup", "assisted") if rows == 1 and family not in RECURRENT else ("sample",)
    mode = dice.choice(("greedy",) * 5 + ("sample", "beam", "beam sample", *alone))
    lengths = tuple(dice.choice(LENGTHS) for _ in range(rows))
    budget = dice.choice(BUDGETS)
    case = Case(
        index,
        family,
        method,
        budget if method != "speckv-pc" else max(budget, BUDGETS[0]),  # it has two, and a ratio is of one length
        lengths,
        new=LONGEST_ANSWER if dice.random() < 0.02 else dice.choice((1, 2, 3, 5, 8)),
        mode=mode,
        early_exit=dice.random() < 0.7 or method == "pyramidkv",  # else its deep layers keep less than all
        eos=dice.random() < 0.15,
        stop=dice.random() < 0.1 and mode != "assisted",  # transformers gives the assistant no tokenizer to stop by
    )
    if mode == "greedy" and dice.random() < 0.3 and case.new > 1 and not case.eos and not case.stop:
        crops = (0, 0, 1, case.new - 1) if family not in RECURRENT else (0,)
        turns = [(dice.choice(crops), dice.choice((1, 2, 6))) for _ in range(dice.choice((1, 2)))]
        ragged = rows > 1 and dice.random() < 0.5
        return dataclasses.replace(case, turns=tuple(turns), ragged=ragged, reset=dice.random() < 0.2)
    if "sample" in mode or "beam" in mode:
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
    for field in (
        "generated",
        "shared",
        "bits",
        "prefix",
        "resampled",
        "reset",
        "dropped",
        "ragged",
        "turns",
        "stop",
        "eos",
        "stream",
        "returned",
        "mode",
        "early_exit",
    ):
        if getattr(case, field) != getattr(plain, field) and not (field == "mode" and case.returned > 1):
            other: dict[str, Any] = {"evict": plain.evict, "shared": False} if field == "generated" else {}
            yield dataclasses.replace(case, **{field: getattr(plain, field)}, **other)
    document = 0 if case.prefix is None else case.prefix[1]
    for simple in (document, 3):
        if case.prefix not in (None, ("device", simple)) and simple <= document:
            yield dataclasses.replace(case, prefix=("device", simple))
    if len(case.turns) > 1:
        yield dataclasses.replace(case, turns=case.turns[:1])
    if len(case.lengths) > 1:
        for row in range(len(case.lengths)):
            yield dataclasses.replace(case, lengths=case.lengths[:row] + case.lengths[row + 1 :])
    if case.new > 2 and not case.turns:
        yield dataclasses.replace(case, new=case.new // 2)
    for row, length in enumerate(case.lengths):
        for simple in (25, 9):
            if length > simple > document:
                yield dataclasses.replace(case, lengths=(*case.lengths[:row], simple, *case.lengths[row + 1 :]))
