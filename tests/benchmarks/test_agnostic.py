"""`specpass bench quality --query-agnostic`: what compresses a prompt does not see what is asked of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from cli_models import save_model
from typer.testing import CliRunner

import specpass
from specpass import cli
from specpass.benchmarks.models import Pair, read_context
from specpass.benchmarks.peers import run as peers
from specpass.benchmarks.quality.run import AGNOSTIC, Grid, Run
from specpass.benchmarks.quality.variants import ORACLE, Variant
from specpass.benchmarks.results import read_results
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.errors import BenchmarkError

METHODS = ("full", "specpass_speckv", "specpass_specpc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def pair(folder: str) -> Pair:
    return Pair(folder, folder, "float32", lowering="eager")


def test_a_budget_that_holds_the_context_answers_as_full_kv(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "agnostic.json"
    grid = Grid(METHODS, ("niah_multikey_2",), (240,), seeds=2, rounds=(0,), agnostic=True)
    assert Run(pair, grid, out, minutes=9).run()
    document = read_results(out)
    tokens = {(record["method"], record["seed"]): record["tokens"] for record in document["results"]}
    assert len(tokens) == 2 * len(METHODS)
    for (method, seed), found in tokens.items():
        assert found == tokens["full", seed], method
    assert "question" in document["settings"]["compressors"]
    with pytest.raises(BenchmarkError, match="other settings"):
        Run(pair, dataclasses.replace(grid, agnostic=False), out, minutes=9)


def test_what_is_kept_is_of_the_context(pair: Pair) -> None:
    """As many slots as the budget, the last W of the context among them, whatever is asked behind it."""
    method = specpass.SnapKV(budget=48, window=16)
    model = specpass.compile(pair.target, method=method, lowering="eager")
    try:
        ids = tuple(torch.randint(3, 90, (200,)).tolist())
        kept = []
        for asked in ((5, 6, 7), (8, 9)):
            prompt = Prompt("", 0, 0, "", (*ids, *asked), (), context=len(ids), agnostic=True)
            cache = read_context(model, method, prompt, new_tokens=4)
            kept.append([layer.positions for layer in cache.layers])
        assert all(map(torch.equal, *kept))
        assert kept[0][0].shape[2] == 48
        assert kept[0][0][0, 0, -16:].tolist() == list(range(184, 200))
    finally:
        specpass.restore(model)


def test_who_is_told_the_answer_sees_the_question() -> None:
    assert ORACLE not in Grid(AGNOSTIC, agnostic=True).methods
    with pytest.raises(BenchmarkError, match=ORACLE):
        Grid(agnostic=True)


def test_the_command_has_a_file_of_its_own(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["-t", folder, "-d", folder, "--dtype", "float32", "--lowering", "eager", "--methods", "specpass_snapkv"]
    args += ["--tasks", "niah_multikey_2", "--lengths", "240", "--seeds", "1", "--query-agnostic"]
    result = CliRunner().invoke(cli.app, ["bench", "quality", *args])
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "bench" / "results").glob("*.json")
    assert file.name == "quality_agnostic.json"
    assert len(read_results(file)["results"]) == 2  # a budget each


WORKER = """
import json, sys
for number, prompt in enumerate(json.load(open(sys.argv[1]))["prompts"]):
    print(json.dumps({"prompt": number, "press": 0, "tokens": [prompt["seen"]], "seconds": 0.5, "kept": 64.0}))
"""


def test_peers_are_told_how_much_they_see(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", worker)
    monkeypatch.setattr(peers, "python", lambda: Path(sys.executable))
    prompt = Prompt("", 0, 0, "", (4, 5, 6, 7), (), context=3)
    work = [(each, 8, [Variant("kvpress_snapkv", 64)]) for each in (prompt, dataclasses.replace(prompt, agnostic=True))]
    assert [found.tokens for found in peers.answers(Pair(folder, folder), work)] == [[4], [3]]
