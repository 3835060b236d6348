"""Two processes (gloo) that decide together, started once; the second one dies in the last case."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import started

HERE = Path(__file__).parent
LIMIT = 300
DIED = 7
LAST = "a process that dies"
CASES = ("heads of all processes share", "the first draft counts")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each case raised, "" where it passed."""
    return started(HERE / "together.py", tmp_path_factory.mktemp("together"), (0, DIED), LIMIT)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_together(case: str, results: list[dict[str, str]]) -> None:
    assert [result[case] for result in results] == ["", ""]


def test_a_process_that_dies_ends_the_other(results: list[dict[str, str]]) -> None:
    assert results[0][LAST] == ""
    assert LAST not in results[1]


def test_every_case_is_looked_at(results: list[dict[str, str]]) -> None:
    assert set(results[0]) == {*CASES, LAST}
