"""How the command line ends: errors as one message, and exit codes.

0; 1 for a mistake that specpass names; 2 for a wrong option; 70 for an error that it did not expect; 130 after Ctrl-C.
"""

from __future__ import annotations

import warnings

import typer
from rich.console import Console
from typer.core import TyperGroup

from specpass.errors import SpecpassError

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
# The third is ClickException, which lives in click or inside typer.
_OWN: tuple[type[Exception], ...] = (typer.Exit, typer.Abort, typer.BadParameter.__mro__[2], BrokenPipeError)


class Group(TyperGroup):
    """Turns errors into one red message and an exit code, unless --debug was given (anywhere on the line)."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if "--debug" in args:  # users add it behind the line that failed
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        debug = ctx.params.get("debug")
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except SpecpassError as error:
            if debug:
                raise
            _complain(f"error: {error}")
            raise typer.Exit(1) from error
        except _OWN:
            raise
        except Exception as error:
            if debug:
                raise
            _complain(f"error: {type(error).__name__}: {error}\nspecpass did not expect this; --debug shows where.")
            raise typer.Exit(UNEXPECTED) from error


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, style="red", markup=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """specpass's own warnings as one line; those of libraries stay behind --debug."""
    if str(message).startswith("specpass: "):
        typer.echo(f"note: {str(message).removeprefix('specpass: ')}", err=True)
