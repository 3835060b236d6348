"""`specpass explain`: what would be rewritten, kept and gained, without loading the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from specpass.cli.options import (
    Budget,
    Draft,
    Dtype,
    Json,
    Lookahead,
    Lowering,
    MaxNewTokens,
    MethodName,
    Options,
    Quiet,
    Revision,
    Target,
    Trust,
    Window,
    choose,
    example,
    shown,
    silence_libraries,
)
from specpass.errors import MethodOptionError, OutputFileError
from specpass.files import check_folder

FORMATS = (".svg", ".dot")
NARROW = 72  # columns; below, tables fall to pieces and the report's lines do not


ORDER = 2


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass explain -t qwen2.5-coder-1.5b -d qwen2.5-coder-0.5b -b 1024"))(explain)


def explain(
    target: Target,
    draft: Draft = None,
    method: MethodName = "speckv",
    budget: Budget = "1024",
    window: Window = None,
    lookahead: Lookahead = None,
    option: Options = None,
    max_new_tokens: MaxNewTokens = 256,
    graph: Annotated[Path | None, typer.Option(help="Draw one layer before and after: FILE.svg or FILE.dot.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Load the models instead of narrow stand-ins.")] = False,
    dtype: Dtype = "auto",
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show sites rewritten, refusals, budgets, bytes and FLOPs, break-even lengths, and the graphs with their seconds.

    Models are compiled as narrow stand-ins of the same layers; bytes and FLOPs are those of the real sizes.
    """
    if graph is not None and graph.suffix not in FORMATS:
        raise OutputFileError(f"--graph {graph}: no known format; name a file that ends in {' or '.join(FORMATS)}.")
    choice = choose(
        target, draft, method, budget, window, lookahead, option, dtype, lowering, revision, trust_remote_code
    )
    if choice.method is None:
        raise MethodOptionError("--method full rewrites nothing, so there is nothing to explain: name a method.")
    from specpass import hub
    from specpass.explain.stand_in import explain as run

    if graph is not None:
        check_folder(graph.parent)
    for name in filter(None, (choice.target, choice.draft)):
        hub.read_config(name, trust_remote_code=choice.trust)  # a wrong name first, then the wait
    if lowering == "inductor" and not quiet:
        typer.echo(f"compiling {'the models' if weights else 'stand-ins'} (about a minute)", err=True)
    silence_libraries()
    with shown(quiet):
        report, stages = run(
            choice.target,
            choice.draft,
            choice.method,
            dtype=dtype,
            lowering=lowering,
            max_new_tokens=max_new_tokens,
            weights=weights,
            trust_remote_code=choice.trust,
        )
    if graph is not None:
        from specpass.explain.draw import draw

        if "PRUNED" not in stages:
            raise OutputFileError(
                f"--graph {graph}: nothing was rewritten, so there is no layer to draw: {'; '.join(report.refusals)}."
            )
        draw(stages["TRACED"], stages["PRUNED"], graph)
        typer.echo(f"wrote {graph}", err=True)
    if as_json:
        typer.echo(json.dumps(report.data(max_new_tokens)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(report if console.width >= NARROW else str(report), markup=False, highlight=False)
