"""Two processes on a CPU (gloo) that share a model: started once, each test looks at what became of one case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 600


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each case raised, "" where it passed."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(HERE.parents[1]), str(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(HERE / "ranks.py"), str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        codes = [process.wait(LIMIT) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


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
    "spread budgets",
    "budgets that are chosen",
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
