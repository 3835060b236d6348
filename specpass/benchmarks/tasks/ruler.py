"""Tasks of RULER (arXiv 2404.06654) that need no download: all but the two that ask about data sets (qa.py).

They are written from its description.
Each function takes a random generator and a wished length and returns a writer: units of haystack -> question.
Names, templates and sizes (4 values, 4 queries, 4 hops, 10 common and 3 frequent words) are RULER's. Where it has
essays, this has prose of Python's language reference.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from random import Random

from specpass.benchmarks.tasks import haystack, vocabulary
from specpass.benchmarks.tasks.prompts import Question

Writer = Callable[[int], Question | None]

VALUES = QUERIES = HOPS = 4
COMMON, FREQUENT = 10, 3


def _word(rng: Random) -> str:
    return f"{rng.choice(vocabulary.ADJECTIVES)}-{rng.choice(vocabulary.NOUNS)}"


def _number(rng: Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def uuid_text(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(draw: Callable[[Random], str], rng: Random, count: int) -> list[str]:
    """`count` different texts."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def spread(needles: Sequence[str], depths: Sequence[float], lines: list[str]) -> list[str]:
    """`lines` with each needle put at its depth in [0, 1]; needles keep their order."""
    placed = list(lines)
    for needle, depth in sorted(zip(needles, sorted(depths), strict=True), key=lambda pair: -pair[1]):
        placed.insert(int(depth * len(lines)), needle)
    return placed


def _prose(rng: Random) -> Callable[[int], list[str]]:
    """count -> that many sentences, from a place that the seed chooses, around the end to the beginning."""
    text = haystack.sentences()
    start = rng.randrange(len(text))
    return lambda count: [text[(start + index) % len(text)] for index in range(count)]


def niah(
    rng: Random,
    *,
    keys: Callable[[Random], str] = _word,
    values: Callable[[Random], str] = _number,
    kind: str = "numbers",
    hay: str,
    needles: int = 1,
    per_key: int = 1,
    asked: int = 1,
) -> Writer:
    """Needles in a haystack: `needles` keys with `per_key` values each, `asked` keys are asked for.

    Args: hay: "noise" repeats a few sentences, "prose" is prose, "needles" makes every line another needle.
    """
    many = 2_000 if hay == "needles" else needles
    names = distinct(keys, rng, many)
    drawn = distinct(values, rng, many * per_key)
    of = {name: drawn[index * per_key : (index + 1) * per_key] for index, name in enumerate(names)}
    text = {name: [f"One of the special magic {kind} for {name} is: {value}." for value in of[name]] for name in names}
    depths = [rng.random() for _ in range(needles * per_key)]
    prose = _prose(rng)

    def write(count: int) -> Question | None:
        if hay == "needles":
            if count > many:
                return None
            queries = [names[int(depths[0] * count)]]
            lines = [line for name in names[:count] for line in text[name]]
        else:
            queries = names[:asked]
            needle_lines = [line for name in names for line in text[name]]
            lines = spread(needle_lines, depths, [haystack.NOISE] * count if hay == "noise" else prose(count))
        query = " and ".join([", ".join(queries[:-1]), queries[-1]]) if len(queries) > 1 else queries[0]
        expected = tuple(value for name in queries for value in of[name])
        singular = kind.removesuffix("s")
        what, are = (singular, "is") if len(expected) == 1 else (f"{kind}", "are")
        ask, every = ("What is", "") if len(expected) == 1 else ("What are", "all ")
        return Question(
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {kind} afterwards.\n" + "\n".join(lines) + "\n",
            f"{ask} {every}the special magic {what} for {query} mentioned in the provided text?",
            f"The special magic {what} for {query} mentioned in the provided text {are}",
            expected,
        )

    return write


def variable_tracking(rng: Random) -> Writer:
    """One chain of assignments in noise; all variables that hold the value are asked for. One example stands before."""

    def chain(value: str) -> tuple[list[str], list[str]]:
        names = distinct(lambda r: "".join(r.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)), rng, HOPS + 1)
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
        return names, lines

    example_value, value = distinct(lambda r: str(r.randint(10_000, 99_999)), rng, 2)
    example, example_lines = chain(example_value)
    names, lines = chain(value)
    depths = [rng.random() for _ in lines]
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text."

    def ask(asked: str) -> str:
        return f"Question: Find all variables that are assigned the value {asked} in the text above."

    def prefix(asked: str) -> str:
        return (
            f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
            f"assigned the value {asked}, they are:"
        )

    shown = "\n".join(spread(example_lines, [0.1, 0.3, 0.5, 0.7, 0.9], [haystack.NOISE] * 5))
    shot = f"{task}\n\n{shown}\n{ask(example_value)} {prefix(example_value)} {' '.join(example)}\n\n"

    def write(count: int) -> Question:
        body = "\n".join(spread(lines, depths, [haystack.NOISE] * count))
        return Question(f"{shot}{task}\n\n{body}\n", ask(value), prefix(value), tuple(names))

    return write


def common_words(rng: Random, length: int) -> Writer:
    """A numbered list in which ten words stand out by their frequency.

    As in RULER they come 30 times and the others 3 times; below 4,096 tokens, where 300 lines leave no room for others,
    10 times and once.
    """
    often, seldom = (30, 3) if length >= 4096 else (10, 1)
    pool = list(haystack.words())
    rng.shuffle(pool)
    order = rng.random()

    def write(count: int) -> Question | None:
        if COMMON + count > len(pool):
            return None
        listed = pool[:COMMON] * often + pool[COMMON : COMMON + count] * seldom
        Random(order).shuffle(listed)
        lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return Question(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{lines}\n",
            f"Question: What are the {COMMON} most common words in the above list?",
            f"Answer: The top {COMMON} words that appear most often in the list are:",
            tuple(pool[:COMMON]),
        )

    return write


def frequent_words(rng: Random) -> Writer:
    """Coded words whose frequencies fall as in Zipf's law (zeta, alpha 2); the three most frequent are asked for."""
    coded = distinct(lambda r: "".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=6)), rng, 500)
    ranked = ["....", *coded]  # the most frequent one is to be ignored
    order, zeta = rng.random(), sum(rank**-2.0 for rank in range(1, 100_000))

    def write(count: int) -> Question | None:
        total = 40 + count
        text = [word for rank, word in enumerate(ranked, 1) for _ in range(round(total * rank**-2.0 / zeta))]
        Random(order).shuffle(text)
        return Question(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\n",
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?",
            "Answer: According to the coded text above, the three most frequently appeared words are:",
            tuple(coded[:FREQUENT]),
        )

    return write
