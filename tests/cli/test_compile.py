"""`specpass compile`: what it made in a folder serves the next compilation, which compiles nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_models import save_model
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from specpass import cli
from specpass.backend.ahead import BEYOND, OF_A_RATIO, SHORT, lengths
from specpass.files import COMPILED, INDUCTOR
from specpass.methods import SnapKV, SpecKV, SpecKVPC

runner = CliRunner()


def test_a_second_process_finds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (COMPILED, INDUCTOR):
        monkeypatch.setenv(name, "")  # put back after the test
    monkeypatch.setattr("specpass.backend.ahead.lengths", lambda *_: (24 + BEYOND,))  # C++ takes ten seconds a graph
    folder, out = save_model(tmp_path / "tiny", num_hidden_layers=1), tmp_path / "out"
    args = ["-t", str(folder), "-m", "snapkv", "-b", "24", "--window", "8", "-n", "4", "--dtype", "float32"]
    made = runner.invoke(cli.app, ["compile", *args, "--out", str(out)])
    assert made.exit_code == 0, made.output
    lines = made.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["prefill", "decode"]
    assert f"{COMPILED}={out} specpass generate" in lines[-1]
    assert any((out / "inductor").rglob("*.so"))

    torch._dynamo.reset()
    counters.clear()
    words = " ".join(f"w{index % 90}" for index in range(60))
    answer = runner.invoke(cli.app, ["generate", *args, "-p", words, "--raw"])
    assert answer.exit_code == 0, answer.output
    assert counters["inductor"]["fxgraph_cache_hit"] >= 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_prompts_are_longer_than_the_budget_and_shorter() -> None:
    class Config:
        max_position_embeddings = 400

        def get_text_config(self) -> Config:
            return self

    assert lengths(SnapKV(budget=256), Config()) == (256 + BEYOND, SHORT)
    assert lengths(SpecKVPC(budget=96, prompt_budget=128), Config()) == (128 + BEYOND, SHORT)
    assert lengths(SpecKV(budget=512), Config()) == (400, SHORT)
    Config.max_position_embeddings = None  # type: ignore[assignment]
    assert lengths(SnapKV(budget=0.25), Config()) == (OF_A_RATIO, SHORT)


def test_without_a_method_there_is_nothing_to_compile(tmp_path: Path) -> None:
    done = runner.invoke(cli.app, ["compile", "-t", "smollm2-135m", "-m", "full"])
    assert done.exit_code == 2
    assert "--method" in done.stderr
    done = runner.invoke(cli.app, ["compile", "-t", "smollm2-135m", "-m", "snapkv", "--out", "/dev/null/x"])
    assert done.exit_code == 1
    assert "/dev/null/x cannot be written to" in done.stderr
