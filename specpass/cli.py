"""The command line: thin commands over the library; torch is imported by the commands that need it.

A command is a function registered on ``app`` (or on a group such as ``models_app``). An error that specpass raises
on purpose is printed as one message; everything else keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from specpass._version import __version__
from specpass.cli_tune import tune
from specpass.errors import SpecpassError


class _Group(TyperGroup):
    """Turns a SpecpassError into one red message and exit code 1, unless --debug was given."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except SpecpassError as error:
            if ctx.params.get("debug"):
                raise
            Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="KV caches of fixed budget for any Hugging Face decoder, through torch.compile and a draft model.",
)
models_app = typer.Typer(no_args_is_help=True, help="Real models that specpass knows by name.")
app.add_typer(models_app, name="models")
app.command("tune")(tune)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of specpass errors.")] = False,
) -> None:
    """Options of every command; both are handled before a command runs."""


@models_app.command("list")
def models_list() -> None:
    """List the models that a name stands for.

    Example: [bold]specpass models list[/bold]
    """
    from specpass.hub import MODELS, is_cached

    table = Table("name", "model", "parameters", "download", "on disk", "cached", "licence")
    for source in MODELS.values():
        table.add_row(
            source.name,
            source.title,
            f"{source.parameters / 1e6:,.0f} M",
            f"{source.size / 1e6:,.0f} MB",
            f"{source.disk / 1e6:,.0f} MB",
            "yes" if is_cached(source.name) else "no",
            source.licence,
        )
    # Names must survive a narrow pipe, where rich would cut them.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@models_app.command("path")
def models_path(
    name: Annotated[str, typer.Argument(help="A name from `specpass models list`, or a model folder.")],
) -> None:
    """Print the folder of a model (last line of stdout), fetching and converting it on first use.

    Example: [bold]specpass models path smollm2-135m[/bold]
    """
    from specpass.hub import check_weights, model_path

    folder = model_path(name)
    check_weights(folder)
    typer.echo(folder)


@app.command()
def demo(
    budget: Annotated[int, typer.Option(help="KV slots per KV head and layer.")] = 128,
    tokens: Annotated[int, typer.Option(help="Prompt length, in tokens.")] = 3000,
) -> None:
    """Find a fact in a long prompt with full KV, SnapKV and SpecKV, and compare answers, memory and speed.

    Example: [bold]specpass demo --budget 128[/bold]
    """
    from specpass.demo import run

    run(budget=budget, tokens=tokens)


def main() -> None:
    """Entry point of the ``specpass`` command."""
    app()


if __name__ == "__main__":
    main()
