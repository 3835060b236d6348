"""`specpass export` and `specpass generate --onnx`: the answer of `specpass generate`, also where torch is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_models import save_model
from onnx_cases import BLOCK
from typer.testing import CliRunner

from specpass import cli

pytest.importorskip("onnxruntime")

METHOD = ["-m", "streamingllm", "-b", "24"]
TEXT = " ".join(f"w{index % 90}" for index in range(60))
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    model = save_model(root / "model")
    out = root / "out"
    result = runner.invoke(cli.app, ["export", "--target", str(model), *METHOD, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    return out


def test_the_answer_is_that_of_generate(folder: Path) -> None:
    prompt = folder.parent / "prompt.txt"
    prompt.write_text(TEXT)
    line = ["--prompt-file", str(prompt), "-n", "8", "--json"]
    ours = json.loads(runner.invoke(cli.app, ["generate", "--onnx", str(folder), *line]).stdout)
    model = str(folder.parent / "model")
    theirs = json.loads(runner.invoke(cli.app, ["generate", "-t", model, *METHOD, "--lowering", "eager", *line]).stdout)
    for name in ("text", "token_ids", "stopped", "method", "prompt_tokens", "new_tokens"):
        assert ours[name] == theirs[name], name


def test_text_streams_without_torch(folder: Path) -> None:
    args = ["generate", "--onnx", str(folder), "-p", TEXT, "-n", "8"]
    code = f"{BLOCK}\nsys.argv = ['specpass', *{args!r}]\nfrom specpass.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == runner.invoke(cli.app, args).stdout
    assert len(done.stdout.split()) == 8


def test_models_of_its_own_and_others_exclude_each_other(folder: Path) -> None:
    result = runner.invoke(cli.app, ["generate", "--onnx", str(folder), "-t", "x", "-p", TEXT])
    assert result.exit_code == 2
    assert "--target" in result.stderr


def test_no_model_at_all() -> None:
    result = runner.invoke(cli.app, ["generate", "-p", TEXT])
    assert result.exit_code == 2
    assert "--onnx" in result.stderr
