"""`specpass models list | path`: the real models that specpass knows by name."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from specpass.cli.options import MODELS, example

ORDER = 6

models_app = typer.Typer(no_args_is_help=True, help="Real models that specpass knows by name.")


def add(app: typer.Typer) -> None:
    app.add_typer(models_app, name="models")


@models_app.command("list", epilog=example("specpass models list"))
def models_list() -> None:
    """List the models that a name stands for."""
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


@models_app.command("path", epilog=example("specpass models path smollm2-135m"))
def models_path(
    name: Annotated[str, typer.Argument(help=f"A {MODELS}.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")] = None,
) -> None:
    """Print the folder of a model (last line of stdout), fetching and converting it on first use."""
    from specpass.hub import at_revision, check_weights, model_path

    folder = model_path(at_revision(name, revision))
    check_weights(folder)
    typer.echo(folder)
