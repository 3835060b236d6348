"""Two processes on a CPU (gloo) that share a model: started once, each test looks at what became of one case."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_ranks import started

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each case raised, "" where it passed."""
    return started(HERE / "ranks.py", tmp_path_factory.mktemp("ranks"))


CASES = (
    "llama-speckv",
    "llama-snapkv",
    "llama-pyramidkv",
    "llama-streamingllm",
    "llama-specpc",
    "llama-speckvpc",
    "qwen2",
    "qwen3",
    "smollm",
    "gemma2",
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


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, results: list[dict[str, str]]) -> None:
    assert [result[case] for result in results] == ["", ""]


def test_every_case_is_looked_at(results: list[dict[str, str]]) -> None:
    assert set(results[0]) == set(results[1]) == set(CASES)
