"""A command is one file: where the command line finds it, and the example of docs/extending.md."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from cli_models import save_model
from pages import example
from typer.testing import CliRunner

from specpass import cli
from specpass.cli import entry

runner = CliRunner()
THERE = ["generate", "compile", "explain", "read", "export", "serve", "tune", "demo", "coverage", "models", "bench"]
HELLO = """
import typer

from specpass.errors import PromptError


def add(app: typer.Typer) -> None:
    app.command()(hello)


def hello(name: str) -> None:
    if not name:
        raise PromptError("there is no name: give one.")
    typer.echo(f"hello {name}")
"""


def module_of(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


def names(app: typer.Typer) -> list[str]:
    command: Any = typer.main.get_command(app)
    return list(command.commands)


def test_the_commands_stand_in_their_order() -> None:
    assert names(cli.app) == THERE


def test_a_command_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = entry.build([module_of("hello_command", HELLO, tmp_path, monkeypatch)])
    assert names(app) == [*THERE[:9], "hello", *THERE[9:]]  # groups come last
    assert runner.invoke(app, ["hello", "you"]).stdout == "hello you\n"
    wrong = runner.invoke(app, ["hello", ""])
    assert (wrong.exit_code, wrong.stderr) == (1, "error: there is no name: give one.\n")
    assert "hello" not in names(cli.app)


def test_a_file_in_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greet.py").write_text("ORDER = 2\n" + HELLO.replace("hello", "greet"))
    (tmp_path / "helper.py").write_text("import specpass.errors\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert names(entry.build())[:5] == ["generate", "compile", "explain", "greet", "read"]
    finally:
        for name in ("greet", "helper"):
            sys.modules.pop(f"specpass.cli.{name}", None)
            vars(cli).pop(name, None)


def test_the_documented_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = example("extending.md", "A command: one file")
    app = entry.build([module_of("sizes", source, tmp_path, monkeypatch)])
    result = runner.invoke(app, ["sizes", "-t", str(save_model(tmp_path / "model"))])
    assert result.stdout == "2 layers, 2 KV heads of 16\n"
    shown = runner.invoke(app, ["sizes", "--help"], env={"COLUMNS": "100"}).stdout
    assert shown.strip().splitlines()[-1].strip() == "Example: specpass sizes -t smollm2-135m"
