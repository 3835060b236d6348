"""The command line, in process: what it prints, where, and how it ends."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from specpass import cli, hub
from specpass._version import __version__
from specpass.errors import SpecpassError, UnknownModelError

runner = CliRunner()


def test_version():
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert __version__ in result.stdout


@pytest.mark.parametrize("command", [[], ["models"], ["models", "path"], ["demo"], ["bench"], ["bench", "quality"]])
def test_help_shows_commands(command):
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_models_list_names_every_model(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path))
    result = runner.invoke(cli.app, ["models", "list"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in hub.MODELS)
    assert "Apache-2.0" in result.stdout


def test_models_path_prints_the_folder_last(tmp_path):
    result = runner.invoke(cli.app, ["models", "path", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(tmp_path)


def test_error_is_one_message_without_traceback():
    result = runner.invoke(cli.app, ["models", "path", "gpt-none"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit | typer.Exit)
    assert "'gpt-none'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_keeps_the_traceback():
    result = runner.invoke(cli.app, ["--debug", "models", "path", "gpt-none"])
    assert isinstance(result.exception, UnknownModelError)
    assert isinstance(result.exception, SpecpassError)
