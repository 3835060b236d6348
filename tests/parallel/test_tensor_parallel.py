"""Two processes on a CPU (gloo) that share a model, and two that come after them: each test looks at one case."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import started

HERE = Path(__file__).parent
DIED = 7  # exit code of the second process of the second pair, in its last case
LAST = "a process that dies"
FIRST = (
    "llama-speckv",
    "llama-snapkv",
    "llama-pyramidkv",
    "llama-streamingllm",
    "llama-specpc",
    "llama-speckvpc",
    "qwen2",
    "qwen3",
    "gemma2",
    "mistral",
    "olmoe",
    "inductor",
    "three turns",
    "another method",
    "another draft",
    "a mistake of one",
    "a draft that scores",
    "heads that do not divide",
    "a style without a form",
    "the plain door",
)
SECOND = (
    "kept graphs",
    "heads of a layer share",
    "heads of all processes share",
    "a budget that is chosen",
    "prefixes that differ",
    "the first draft counts",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both pairs, which the second begins with what the first has kept in."""
    path = tmp_path_factory.mktemp("ranks")
    for name in ("first", "second"):
        (path / name).mkdir()
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, str]]:
    """Of each rank of the first pair: what each case raised, "" where it passed."""
    return started(HERE / "ranks.py", folder / "first")


@pytest.fixture(scope="module")
def together(folder: Path, results: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of the second pair."""
    return started(HERE / "together.py", folder / "second", (0, DIED), 600)


@pytest.mark.parametrize("case", FIRST)
def test_two_processes(case: str, results: list[dict[str, str]]) -> None:
    assert [result[case] for result in results] == ["", ""]


@pytest.mark.parametrize("case", SECOND)
def test_two_that_come_after_them(case: str, together: list[dict[str, str]]) -> None:
    assert [result[case] for result in together] == ["", ""]


def test_a_process_that_dies_ends_the_other(together: list[dict[str, str]]) -> None:
    assert together[0][LAST] == ""
    assert LAST not in together[1]


def test_every_case_is_looked_at(results: list[dict[str, str]], together: list[dict[str, str]]) -> None:
    assert set(results[0]) == set(results[1]) == set(FIRST)
    assert set(together[0]) == {*SECOND, LAST}
