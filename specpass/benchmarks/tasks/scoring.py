"""Scores of an answer in [0, 1], as the benchmarks that the tasks come from define them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def contained(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected texts that the answer contains, case ignored (RULER's string_match_all)."""
    said = answer.lower()
    return sum(text.lower() in said for text in expected) / len(expected)


def any_contained(answer: str, expected: Sequence[str]) -> float:
    """1 where the answer contains one of the expected texts, case ignored (RULER's string_match_part)."""
    said = answer.lower()
    return float(any(text.lower() in said for text in expected))


def edit_similarity(answer: str, expected: Sequence[str]) -> float:
    """Similarity of the answer's first line of code with the expected line (LongBench's code_sim_score).

    The ratio is fuzzywuzzy's, which LongBench uses: difflib's, in whole hundredths.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, expected[0]).ratio()) / 100
