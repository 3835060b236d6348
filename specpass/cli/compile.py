"""`specpass compile`: make the graphs of a pair and a method before they are needed."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from specpass.cli.generate import check_speculation
from specpass.cli.options import (
    Budget,
    Draft,
    DraftBits,
    Dtype,
    Lookahead,
    MaxNewTokens,
    MethodName,
    Options,
    Quiet,
    Revision,
    Speculate,
    Target,
    Trust,
    Window,
    check_device,
    choose,
    example,
    load_pair,
    shown,
    silence_libraries,
)
from specpass.files import COMPILED, INDUCTOR, check_folder, compiled_dir
from specpass.observe import progress

ORDER = 2


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass compile -t smollm2-135m -m snapkv -b 256 --out compiled"))(compile)


def compile(
    target: Target,
    draft: Draft = None,
    method: MethodName = "speckv",
    budget: Budget = "1024",
    window: Window = None,
    lookahead: Lookahead = None,
    speculate: Speculate = 0,
    draft_bits: DraftBits = None,
    option: Options = None,
    max_new_tokens: MaxNewTokens = 256,
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"A folder to keep it all in, for {COMPILED}; by default the cache folders."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Compile what `generate` with the same options will need, so that a later process starts from caches.

    For one prompt at a time: longer than the budget, or not, and the steps behind it. With --out, processes that have
    SPECPASS_COMPILED=FOLDER find it; on this kind of machine, with these versions.
    """
    choice = choose(
        target, draft, method, budget, window, lookahead, option, dtype, "inductor", revision, trust_remote_code
    )
    if choice.method is None:
        raise typer.BadParameter("without a method nothing is compiled.", param_hint="--method")
    choice = dataclasses.replace(choice, speculate=check_speculation(speculate, choice), draft_bits=draft_bits)
    if out is not None:
        check_folder(out)
        os.environ[COMPILED] = str(out.absolute())
    check_device(device)
    import specpass
    from specpass.backend.ahead import compile_ahead

    silence_libraries()
    start = time.perf_counter()
    with shown(quiet), progress.task("graphs ahead", 2):
        model, _draft, _tokenizer = load_pair(choice, device)
        compile_ahead(model, max_new_tokens)
    report = specpass.report(model)
    for graph in report.graphs:
        typer.echo(
            f"{graph.kind}: {graph.distinct_regions} distinct of {graph.regions} layers compiled, {graph.seconds:.1f} s"
        )
    for reason in [report.interpreted, *report.refusals]:
        if reason:
            typer.echo(f"note: not compiled: {reason}", err=True)
    if not quiet:
        typer.echo(f"{time.perf_counter() - start:.0f} s in all", err=True)
    if out is None:
        typer.echo(f"in {compiled_dir()} and {os.environ.get(INDUCTOR, 'the folder of Inductor')}")
    else:
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        typer.echo(f"in {out}, {size / 1e6:,.0f} MB: {COMPILED}={out} specpass generate ...")
