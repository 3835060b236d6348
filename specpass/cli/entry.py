"""The command line: thin commands over the library; torch is imported by the commands that need it.

A command is a module of this package with a function `add(app)`, which registers it; ORDER is its place in the help.
An error is printed as one message, and keeps its traceback with --debug.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated

import typer

from specpass._version import __version__
from specpass.cli.group import Group

LAST = 100  # the place of a command without ORDER


def commands() -> list[ModuleType]:
    """The modules of this package that are commands."""
    package = importlib.import_module("specpass.cli")
    names = {info.name for info in pkgutil.iter_modules(package.__path__)} - {"__main__"}  # which would run
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in sorted(names)]
    return [module for module in modules if "add" in vars(module)]


def build(extra: Iterable[ModuleType] = ()) -> typer.Typer:
    """The command line of this package's commands and of `extra` ones."""
    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        help="KV caches of fixed budget for any Hugging Face decoder, through torch.compile and a draft model.",
    )
    app.callback()(_options)
    for module in sorted([*commands(), *extra], key=lambda module: vars(module).get("ORDER", LAST)):
        module.add(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specpass {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command; both are handled before a command runs."""


app = build()


def main() -> None:
    """Entry point of the ``specpass`` command."""
    # Read when torch loads OpenMP: threads that spin between operators cost more than they compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    app()
