"""The command line: thin commands over the library; torch is imported by the commands that need it.

A command is a function registered on ``app`` (or on a group such as ``models_app``); the bigger ones have a file of
their own. An error is printed as one message, and keeps its traceback with --debug.

Exit codes: 0, 1 for a mistake that specpass names, 2 for a wrong option, 70 for an error that it did not expect, 130
after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from specpass._version import __version__
from specpass.cli import explain as cli_explain
from specpass.cli import export as cli_export
from specpass.cli import generate as cli_generate
from specpass.cli.bench import bench_app
from specpass.cli.options import Dtype, Lowering, check_words
from specpass.cli.tune import tune
from specpass.errors import SpecpassError

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
# The third is ClickException, which lives in click or inside typer.
_OWN: tuple[type[Exception], ...] = (typer.Exit, typer.Abort, typer.BadParameter.__mro__[2], BrokenPipeError)


class _Group(TyperGroup):
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
            raise typer.Exit(cli_generate.INTERRUPTED) from None
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


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="KV caches of fixed budget for any Hugging Face decoder, through torch.compile and a draft model.",
)
models_app = typer.Typer(no_args_is_help=True, help="Real models that specpass knows by name.")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specpass {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command; both are handled before a command runs."""


def _example(line: str) -> str:
    """The end of a command's help: a line that works."""
    return f"Example: [bold]{line}[/bold]"


app.command(epilog=_example('specpass generate -t smollm2-135m -m snapkv -p "Why is the sky blue?"'))(
    cli_generate.generate
)
app.command(epilog=_example("specpass explain -t qwen2.5-coder-1.5b -d qwen2.5-coder-0.5b -b 1024"))(
    cli_explain.explain
)


app.command(epilog=_example("specpass export -t smollm2-135m -m snapkv -b 256 --out smollm2-onnx"))(cli_export.export)
app.command(epilog=_example("specpass tune -t qwen2.5-coder-1.5b -b 256,512 --arch sm_90 --json tiles.json"))(tune)


@models_app.command("list", epilog=_example("specpass models list"))
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


@models_app.command("path", epilog=_example("specpass models path smollm2-135m"))
def models_path(
    name: Annotated[str, typer.Argument(help="A name from `specpass models list`, or a model folder.")],
) -> None:
    """Print the folder of a model (last line of stdout), fetching and converting it on first use."""
    from specpass.hub import check_weights, model_path

    folder = model_path(name)
    check_weights(folder)
    typer.echo(folder)


@app.command(epilog=_example("specpass demo --budget 128"))
def demo(
    budget: Annotated[int, typer.Option("--budget", "-b", help="KV slots per KV head and layer.")] = 128,
    tokens: Annotated[int, typer.Option(min=256, help="Prompt length, in tokens.")] = 4000,
    target: Annotated[str, typer.Option("--target", "-t", help="Name, hub id or folder.")] = "qwen2.5-coder-1.5b",
    draft: Annotated[str, typer.Option("--draft", "-d", help="Name, hub id or folder.")] = "qwen2.5-coder-0.5b",
    dtype: Dtype = "bfloat16",
    lowering: Lowering = "inductor",
    out: Annotated[Path, typer.Option(help="Folder for kept.png and kept.html.")] = Path("specpass-demo"),
) -> None:
    """Find a fact in a long prompt with full KV and each method: answers, memory, speed, and what was kept."""
    check_words(dtype, lowering)
    from specpass.demo.run import run

    run(budget, tokens, target=target, draft=draft, dtype=dtype, lowering=lowering, out=out)


def main() -> None:
    """Entry point of the ``specpass`` command."""
    # Read when torch loads OpenMP: threads that spin between operators cost more than they compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    app()


if __name__ == "__main__":
    main()
