"""`specpass coverage`: which decoder families of transformers are pruned, and why the others are not."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Annotated

import typer

from specpass.cli.options import example

ORDER = 8


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass coverage --family llama --family gemma3_text --out coverage.json"))(coverage)


def coverage(
    family: Annotated[
        list[str] | None, typer.Option("--family", help="A model_type of transformers, tried anew; repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Families at a time.")] = 1,
    shard: Annotated[str, typer.Option(help="I/N: every N-th family from the I-th on.")] = "1/1",
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("bench/results/coverage.json"),
    page: Annotated[Path | None, typer.Option(help="Markdown page to write, e.g. docs/coverage.md.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what the file holds.")] = False,
) -> None:
    """Try every decoder family, tiny and random: exact at a covering budget, pruned layers, SpecPC, batches, bytes.

    Resumes where it stopped; ends with 1 where anything is wrong, an error or a traceback.
    """
    parts = re.fullmatch(r"(\d+)/(\d+)", shard)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise typer.BadParameter(f"{shard!r} is not I/N with 1 <= I <= N.", param_hint="--shard")
    from specpass.benchmarks.coverage.page import page as markdown
    from specpass.benchmarks.coverage.run import FAULTS, Run
    from specpass.benchmarks.results import read_results
    from specpass.files import write_file

    run = Run(out, tuple(family or ()), jobs, (int(parts[1]), int(parts[2])), restart)
    records = list(run.run().records.values())
    if page is not None:
        write_file(page, markdown(read_results(out)))
        typer.echo(f"wrote {page}")
    counts = collections.Counter(record["verdict"] for record in records)
    typer.echo(f"wrote {out}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    if any(record["verdict"] in FAULTS for record in records):
        raise typer.Exit(1)
