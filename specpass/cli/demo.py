"""`specpass demo`: a fact in a long prompt, with full KV and each method side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specpass.cli.options import (
    MODELS,
    Lowering,
    Quiet,
    Revision,
    Trust,
    check_words,
    example,
    shown,
    silence_libraries,
)

ORDER = 5


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass demo --budget 128"))(demo)


def demo(
    budget: Annotated[int, typer.Option("--budget", "-b", help="KV slots per KV head and layer.")] = 128,
    tokens: Annotated[
        int | None, typer.Option(min=256, help="Prompt length, in tokens; 2,000, or 4,000 --full.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Four methods instead of two: about seven minutes instead of three.")
    ] = False,
    target: Annotated[str, typer.Option("--target", "-t", help=f"A {MODELS}.")] = "qwen2.5-coder-1.5b",
    draft: Annotated[str, typer.Option("--draft", "-d", help=f"A {MODELS}.")] = "qwen2.5-coder-0.5b",
    dtype: Annotated[
        str | None, typer.Option(help="auto (as stored), bfloat16, float16 or float32; bfloat16 where the CPU has it.")
    ] = None,
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    out: Annotated[Path, typer.Option(help="Folder for kept.png and kept.html.")] = Path("specpass-demo"),
    quiet: Quiet = False,
) -> None:
    """Find a fact in a long prompt with full KV and with methods: answers, memory, speed, and what was kept."""
    check_words(dtype or "bfloat16", lowering)
    from specpass import hub
    from specpass.demo import run as demo

    default, methods = (demo.ALL_TOKENS, demo.ALL_METHODS) if full else (demo.TOKENS, demo.METHODS)
    silence_libraries()
    with shown(quiet):
        demo.run(
            budget,
            tokens or default,
            methods=methods,
            target=hub.at_revision(target, revision),
            draft=draft,
            dtype=dtype,
            lowering=lowering,
            trust_remote_code=trust_remote_code,
            out=out,
        )
