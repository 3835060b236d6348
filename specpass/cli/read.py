"""`specpass read`: a document's keys and values in a file, for questions to come."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from specpass.cli.options import (
    Budget,
    Draft,
    Dtype,
    Json,
    Lookahead,
    Lowering,
    MethodName,
    Quiet,
    Revision,
    Target,
    Trust,
    Window,
    check_device,
    choose,
    encode_document,
    example,
    load_pair,
    read_prompt,
    shown,
    silence_libraries,
)
from specpass.files import check_folder

ORDER = 2


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass read -t smollm2-135m -m snapkv -f document.txt -o doc.prefix"))(read)


def read(
    target: Target,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; an earlier one is replaced.")],
    draft: Draft = None,
    method: MethodName = "speckv",
    budget: Budget = "1024",
    window: Window = None,
    lookahead: Lookahead = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Another field of the method, NAME=VALUE; repeatable.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option("--file", "-f", help="The document as UTF-8 text; stdin if left out.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Read the text as it is, without the chat template.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Dtype = "auto",
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a document once, target and draft, for `specpass generate --prefix` with the same models.

    The file holds all keys and values; how much an answer keeps of them is chosen there, by each question.
    """
    choice = choose(
        target, draft, method, budget, window, lookahead, option, dtype, lowering, revision, trust_remote_code
    )
    if choice.method is None:
        raise typer.BadParameter("needs a method that prunes: leave full out.", param_hint="--method")
    text = read_prompt(None, document)
    check_device(device)
    check_folder(out.parent)
    silence_libraries()
    with shown(quiet):
        import specpass

        model, _draft, tokenizer = load_pair(choice, device)
        start = time.perf_counter()
        prefix = specpass.read(model, encode_document(tokenizer, text, raw), device="cpu")
        seconds = time.perf_counter() - start
        prefix.save(out)
    told = {"file": str(out), "tokens": len(prefix), "kv_bytes": prefix.nbytes, "seconds": round(seconds, 3)}
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(f"{out}: {len(prefix):,} tokens, {prefix.nbytes / 2**20:,.1f} MiB, read in {seconds:.1f} s")
