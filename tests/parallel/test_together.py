"""Two processes (gloo) that decide together, started once; the second one dies in the last case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 300
DIED = 7
LAST = "a process that dies"
CASES = ("heads of all processes share", "the first draft counts")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each case raised, "" where it passed."""
    folder = tmp_path_factory.mktemp("together")
    paths = [str(HERE.parents[1]), str(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(HERE / "together.py"), str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        codes = [process.wait(LIMIT) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, DIED], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_together(case: str, results: list[dict[str, str]]) -> None:
    assert [result[case] for result in results] == ["", ""]


def test_a_process_that_dies_ends_the_other(results: list[dict[str, str]]) -> None:
    assert results[0][LAST] == ""
    assert LAST not in results[1]


def test_every_case_is_looked_at(results: list[dict[str, str]]) -> None:
    assert set(results[0]) == {*CASES, LAST}
