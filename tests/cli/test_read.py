"""`specpass read` and `specpass generate --prefix`: the answer is that of document and question as one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_models import save_model
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import specpass
from specpass import cli
from specpass.backend import direct

DOCUMENT = " ".join(f"w{index % 90}" for index in range(60))
METHOD = ["-m", "snapkv", "-b", "24", "--window", "8", "--lowering", "eager"]


def invoke(*args: str) -> Any:
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and have tests of their own."""
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "a test says so")


def test_read_and_ask(tmp_path: Path) -> None:
    folder, document, file = save_model(tmp_path / "tiny"), tmp_path / "document.txt", tmp_path / "doc.prefix"
    document.write_text(DOCUMENT)
    how = ["-t", str(folder), *METHOD]
    told = invoke("read", *how, "-f", str(document), "-o", str(file))
    assert "doc.prefix: 61 tokens" in told.stdout  # the template's <s> among them
    answers = [
        json.loads(invoke("generate", *how, "-n", "6", "--json", *more).stdout)
        for more in (["-p", f"{DOCUMENT} w7 w8"], ["-p", "w7 w8", "--prefix", str(file)])
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert [answer["prefix_tokens"] for answer in answers] == [0, 61]
    assert answers[0]["prompt_tokens"] == 61 + answers[1]["prompt_tokens"]


def test_as_it_is_and_as_json(tmp_path: Path) -> None:
    folder, document, file = save_model(tmp_path / "tiny", template=None), tmp_path / "d.txt", tmp_path / "doc.prefix"
    document.write_text(DOCUMENT)
    how = ["-t", str(folder), "-d", str(folder), "-b", "24", "--window", "8", "--lowering", "eager", "--raw"]
    told = json.loads(invoke("read", *how, "-f", str(document), "-o", str(file), "--json").stdout)
    assert told["tokens"] == 60
    assert told["kv_bytes"] == 2 * 2 * 2 * 2 * 60 * 16 * 4  # models, layers, K and V, heads, tokens, D, float32
    assert len(specpass.Prefix.load(file)) == 60


def test_turns_behind_an_answer(tmp_path: Path) -> None:
    """Each is what the conversation so far is as one prompt, where what is dropped is held."""
    folder = save_model(tmp_path / "tiny")
    how = ["generate", "-t", str(folder), *METHOD, "-n", "6", "--json"]
    told = json.loads(invoke(*how, "-p", DOCUMENT, "--then", "w7 w8", "--then", "w9", "--dropped", "host").stdout)
    assert told["host_bytes"] == 2 * 2 * 2 * 128 * 16 * 4  # layers, K and V, heads, tokens in 64s, D, float32
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    first, second = (" ".join(tokenizer.convert_ids_to_tokens(own["token_ids"])) for own in (told, told["turns"][0]))
    text = f"<s> {DOCUMENT} <a> {first} <s> w7 w8 <a> {second} <s> w9 <a>"
    whole = json.loads(invoke(*how, "--raw", "-p", text).stdout)
    assert told["turns"][1]["token_ids"] == whole["token_ids"]
    assert json.loads(invoke(*how, "-p", DOCUMENT, "--then", "w7 w8").stdout)["host_bytes"] == 0
