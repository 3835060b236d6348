"""`specpass export`: write a target with its draft and method for ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from specpass.cli.options import (
    Budget,
    Draft,
    Lookahead,
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

ORDER = 3


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass export -t smollm2-135m -m snapkv -b 256 --out smollm2-onnx"))(export)


def export(
    target: Target,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; an earlier export there is replaced.")],
    draft: Draft = None,
    method: MethodName = "speckv",
    budget: Budget = "1024",
    window: Window = None,
    lookahead: Lookahead = None,
    option: Options = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    weights: Annotated[str, typer.Option(help="float, or int8: quantized by ONNX Runtime.")] = "float",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write a target with its draft and method for ONNX Runtime: prefill.onnx, decode.onnx, specpass.json.

    --method none exports the exact model. What was written runs without torch: `specpass generate --onnx`.
    """
    if dtype not in ("float32", "float16"):
        raise typer.BadParameter(f"{dtype!r} is neither float32 nor float16.", param_hint="--dtype")
    if weights not in ("float", "int8"):
        raise typer.BadParameter(f"{weights!r} is neither float nor int8.", param_hint="--weights")
    name = "full" if method.lower() == "none" else method
    choice = choose(target, draft, name, budget, window, lookahead, option, dtype, "eager", revision, trust_remote_code)
    from specpass import hub
    from specpass.export.api import check_method, check_packages, export_onnx

    check_packages(weights)
    check_method(choice.method)
    start = time.perf_counter()
    silence_libraries()
    with shown(quiet):
        model, tokenizer = hub.load(choice.target, dtype, trust_remote_code=choice.trust)
        small = model if choice.draft == choice.target else None
        if choice.draft is not None and small is None:
            small = hub.load(choice.draft, dtype, trust_remote_code=choice.trust)[0]
        folder = export_onnx(model, small, choice.method, out, weights=weights, tokenizer=tokenizer)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if not quiet:
        typer.echo(f"{folder}: {size / 1e6:,.0f} MB in {time.perf_counter() - start:.0f} s", err=True)
    typer.echo(folder)
