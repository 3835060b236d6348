"""The command line, in process: what it prints, where, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys

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


def test_a_reader_that_goes_away_ends_it_quietly():
    with subprocess.Popen(
        [sys.executable, "-m", "specpass.cli", "models", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode in (0, 1)
    assert error == ""


def test_threads_do_not_spin_unless_the_user_says_so(monkeypatch):
    monkeypatch.setattr("specpass.cli.entry.app", lambda: None)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main()
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_have_no_colour_and_whole_names_in_a_pipe(columns):
    env = {**os.environ, "COLUMNS": columns, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "specpass.cli", "models", "list"], capture_output=True, text=True, env=env, check=True
    )
    assert "\x1b" not in done.stdout
    assert all(name in done.stdout for name in hub.MODELS)
