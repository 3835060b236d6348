"""`specpass explain`: what would be rewritten, kept and gained, without loading the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from specpass.cli.options import (
    Budget,
    Choice,
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
from specpass.errors import MethodOptionError, OutputFileError, UnknownArchError
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
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Plan a prompt of so many tokens on paper; nothing is compiled.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Of --tokens: tensor parallel over so many devices.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Of --tokens: their kind, sm_80, sm_90, gfx942, ...; sm_90.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show sites rewritten, refusals, budgets, bytes and FLOPs, break-even lengths, and the graphs with their seconds.

    Models are compiled as narrow stand-ins of the same layers; bytes and FLOPs are those of the real sizes. With
    --tokens, instead: bytes, FLOPs and the least seconds of each device for a prompt of so many tokens.
    """
    check_planned(tokens, {"--devices": devices, "--arch": arch}, {"--graph": graph, "--weights": weights})
    if graph is not None and graph.suffix not in FORMATS:
        raise OutputFileError(f"--graph {graph}: no known format; name a file that ends in {' or '.join(FORMATS)}.")
    choice = choose(
        target, draft, method, budget, window, lookahead, option, dtype, lowering, revision, trust_remote_code
    )
    if choice.method is None:
        raise MethodOptionError("--method full rewrites nothing, so there is nothing to explain: name a method.")
    if tokens is not None:
        on_paper(choice, tokens, devices or 1, arch or "sm_90", max_new_tokens, as_json)
        return
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
            why = "; ".join(report.refusals or report.notes)
            raise OutputFileError(f"--graph {graph}: nothing was rewritten, so there is no layer to draw: {why}.")
        draw(stages["TRACED"], stages["PRUNED"], graph)
        typer.echo(f"wrote {graph}", err=True)
    if as_json:
        typer.echo(json.dumps(report.data(max_new_tokens)))
    else:
        show(str(report) if console().width < NARROW else report)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def show(what: RenderableType) -> None:
    console().print(what, markup=False, highlight=False)


def check_planned(tokens: int | None, planned: dict[str, object], compiled: dict[str, object]) -> None:
    """Raises: typer.BadParameter: an option of the other way to explain."""
    for name in (name for name, given in planned.items() if given and tokens is None):
        raise typer.BadParameter("it belongs to a plan: add --tokens, the length of a prompt.", param_hint=name)
    for name in (name for name, given in compiled.items() if given and tokens is not None):
        raise typer.BadParameter("a plan compiles nothing: leave --tokens out.", param_hint=name)


def on_paper(choice: Choice, tokens: int, devices: int, arch: str, max_new_tokens: int, as_json: bool) -> None:
    """Raises: UnknownArchError, ScaleError, ParallelPlanError, and what reading a config raises."""
    from specpass import hub
    from specpass.explain.plan import plan
    from specpass.explain.plan_table import table
    from specpass.explain.stand_in import dtype_of
    from specpass.kernels.archs import ARCHS

    assert choice.method is not None, "full KV stands beside every method"
    if arch not in ARCHS:
        raise UnknownArchError(f"--arch {arch}: expected one of {', '.join(ARCHS)}, whose rates are known.")
    target = hub.read_config(choice.target, trust_remote_code=choice.trust)
    draft = None if choice.draft is None else hub.read_config(choice.draft, trust_remote_code=choice.trust)
    sizes = [dtype_of(config, choice.dtype).itemsize if config is not None else 0 for config in (target, draft)]
    made = plan(
        target,
        draft,
        choice.method,
        tokens=tokens,
        devices=devices,
        arch=ARCHS[arch],
        new_tokens=max_new_tokens,
        itemsizes=(sizes[0], sizes[1]),
    )
    if as_json:
        typer.echo(json.dumps(made.data()))
    else:
        show(table(made))
