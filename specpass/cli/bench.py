"""`specpass bench quality | speed | verify | plot`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specpass.cli.options import MODELS, Dtype, Lowering, Revision, Trust, check_words, example

if TYPE_CHECKING:
    from specpass.benchmarks.models import Pair

RESULTS = Path("bench/results")
QUICK_MINUTES, MINUTES = 8.0, 110.0  # the step that is under way when the time is over is finished

Target = Annotated[str, typer.Option("--target", "-t", help=f"A {MODELS}.")]
Draft = Annotated[str, typer.Option("--draft", "-d", help=f"A {MODELS}.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small part of the grid, in less than ten minutes.")]
Minutes = Annotated[
    float | None, typer.Option(min=0.0, help="Stop after so many; a rerun goes on. Default: 110, with --quick 8.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what the file holds.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Words = Annotated[str | None, typer.Option(help="Some of them only, separated by commas.")]

ORDER = 7

bench_app = typer.Typer(no_args_is_help=True, help="Quality and speed beside other implementations, as JSON files.")


def add(app: typer.Typer) -> None:
    app.add_typer(bench_app, name="bench")


def _quiet_threads() -> None:
    """Spinning OpenMP threads make small operators forty times slower on few cores; read when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers separated by commas.", param_hint=name) from None


def _budgets(text: str) -> tuple[int | float, ...]:
    try:
        return tuple(int(word) if word.isdecimal() else float(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: expected slots or ratios separated by commas, such as 256,0.1.", param_hint="--budgets"
        ) from None


def _changed(grid: Any, given: dict[str, Any]) -> Any:
    """The grid or plan with those of its fields that were given."""
    return dataclasses.replace(grid, **{name: value for name, value in given.items() if value is not None})


def _pair(target: str, draft: str, dtype: str, device: str, lowering: str, revision: str | None, trust: bool) -> Pair:
    from specpass import hub
    from specpass.benchmarks.models import Pair

    return Pair(hub.at_revision(target, revision), draft, dtype, device, lowering, trust)


def _limit(minutes: float | None, quick: bool) -> float:
    if minutes is not None:
        return minutes
    return QUICK_MINUTES if quick else MINUTES


def _default(kind: str, quick: bool) -> Path:
    """Where a benchmark's results go, and are looked for."""
    return RESULTS / f"{kind}{'_quick' if quick else ''}.json"


@bench_app.command(epilog=example("specpass bench quality --quick"))
def quality(
    target: Target = "qwen2.5-coder-1.5b",
    draft: Draft = "qwen2.5-coder-0.5b",
    quick: Quick = False,
    methods: Words = None,
    tasks: Words = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt tokens; all budgets at the first, one at more.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="KV slots (SpecPC: tokens) or ratios of the prompt, for all methods and lengths.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Prompts of each task and length.")] = None,
    query_agnostic: Annotated[
        bool,
        typer.Option("--query-agnostic", help="Compressors see a prompt's context; what is asked of it comes behind."),
    ] = False,
    minutes: Minutes = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file, bench/results/quality.json by default, or quality_agnostic.json.")
    ] = None,
    restart: Restart = False,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answers of every method to long prompts, scored: RULER's tasks and code. Resumes; stops at its time limit."""
    check_words(dtype, lowering)
    _quiet_threads()
    from specpass.benchmarks.quality import run as runner
    from specpass.benchmarks.quality.summary import markdown

    given = {
        "methods": methods and _words(methods),
        "tasks": tasks and _words(tasks),
        "lengths": lengths and _numbers("--lengths", lengths),
        "seeds": seeds,
        "budgets": budgets and _budgets(budgets),
        "agnostic": query_agnostic,
    }
    whole = runner.Grid(runner.AGNOSTIC) if query_agnostic else runner.Grid()
    grid = _changed(runner.QUICK if quick else whole, given)
    out = out or _default("quality_agnostic" if query_agnostic else "quality", quick)
    pair = _pair(target, draft, dtype, device, lowering, revision, trust_remote_code)
    run = runner.Run(pair, grid, out, _limit(minutes, quick), restart)
    complete = run.run()
    table = markdown(run.store.parts["summary"])
    _finish(out, table, complete)


def _finish(out: Path, table: str, complete: bool) -> None:
    """Write the table beside the file, and say what there is."""
    from specpass.files import write_file

    write_file(out.with_suffix(".md"), table)
    typer.echo(table)
    typer.echo(f"wrote {out} and {out.with_suffix('.md')}")
    if not complete:
        typer.echo("The grid is not complete: the same command goes on where this one stopped.")


@bench_app.command(epilog=example("specpass bench speed --quick"))
def speed(
    target: Target = "qwen2.5-coder-1.5b",
    draft: Draft = "qwen2.5-coder-0.5b",
    quick: Quick = False,
    methods: Words = None,
    lengths: Annotated[str | None, typer.Option(help="Prompt tokens S.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes.")] = None,
    minutes: Minutes = None,
    out: Annotated[Path | None, typer.Option(help="JSON file, bench/results/speed.json by default.")] = None,
    restart: Restart = False,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """First token, decode rate, memory and compile time of each method, with floors. Resumes; stops at its limit."""
    check_words(dtype, lowering)
    _quiet_threads()
    from specpass.benchmarks.results import read_results
    from specpass.benchmarks.speed import run as runner
    from specpass.benchmarks.speed.table import markdown

    given = {
        "methods": methods and _words(methods),
        "lengths": lengths and _numbers("--lengths", lengths),
        "batches": batches and _numbers("--batches", batches),
    }
    plan = _changed(runner.QUICK if quick else runner.Plan(), given)
    out = out or _default("speed", quick)
    pair = _pair(target, draft, dtype, device, lowering, revision, trust_remote_code)
    complete = runner.Run(pair, plan, out, _limit(minutes, quick), restart, quick=quick).run()
    _finish(out, markdown(read_results(out)), complete)


@bench_app.command(epilog=example("specpass bench verify bench/results/quality.json"))
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="What `specpass bench quality` wrote; by default its default file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="By default what `quality --quick` wrote.")] = False,
    target: Annotated[str | None, typer.Option("--target", "-t", help="The target, where it was a folder.")] = None,
    revision: Revision = None,
) -> None:
    """Make the prompts anew from their seeds, score the answers anew; ends with 1 where anything differs."""
    _quiet_threads()
    from specpass.benchmarks.quality.verify import verify as check

    count = check(file or _default("quality", quick), target, revision)
    typer.echo(f"{count} answers verified: prompts, scores and summary are those of the seeds")


@bench_app.command(epilog=example("specpass bench plot bench/results/quality.json"))
def plot(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="What `specpass bench quality` or `speed` wrote; by default their default files."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="By default what their --quick wrote.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; by default beside each file.")] = None,
) -> None:
    """Draw a file's results: score and retention over budget; decode time and first token over prompt length."""
    from specpass.benchmarks.plots import draw

    both = [_default(kind, quick) for kind in ("quality", "speed")]
    for file in files or [file for file in both if file.exists()] or both:
        for path in draw(file, out or file.parent):
            typer.echo(f"wrote {path}")
