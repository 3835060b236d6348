"""`specpass tune`: find tiles for a model's kernels and keep them where compiled models look."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specpass.cli.options import Lookahead, MaxNewTokens, MethodName, Options, Window, example
from specpass.errors import BudgetError, TritonMissingError, UnknownArchError
from specpass.files import check_folder, write_file
from specpass.methods.base import Method
from specpass.methods.registry import make_method

if TYPE_CHECKING:
    from specpass.kernels.store import Entry
    from specpass.kernels.tuner import Job

console = Console(stderr=True, highlight=False)


ORDER = 4


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass tune -t qwen2.5-coder-1.5b -b 256,512 --arch sm_90 --json tiles.json"))(tune)


def tune(
    target: Annotated[
        str, typer.Option("--target", "-t", help="A model's name or folder; only its config.json is read.")
    ] = "",
    draft: Annotated[
        str, typer.Option("--draft", "-d", help="The draft's name or folder, to tune its kernels too.")
    ] = "",
    method: MethodName = "speckv",
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budgets C, separated by commas.")] = "256,512,1024",
    arch: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; default: the GPU here, or sm_90.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt length in tokens: its order of magnitude.")] = 32_000,
    window: Window = None,
    lookahead: Lookahead = None,
    options: Options = None,
    max_new_tokens: MaxNewTokens = 256,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of each kernel to compile.")] = 8,
    jobs: Annotated[int, typer.Option(min=0, help="Compiler processes; 0: one for each core.")] = 0,
    json_path: Annotated[str, typer.Option("--json", help="Write the winners to this file.")] = "",
    emit_path: Annotated[str, typer.Option("--emit", help="Write each kernel as a readable module here.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List what is in the store.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Empty the store.")] = False,
) -> None:
    """Find the fastest tiles of a model's kernels; compiled models use them without being told.

    Without a GPU of the architecture, tiles are ranked by a cost model. A run that is cut off goes on where it was.
    """
    from specpass.kernels import store

    if clear:
        typer.echo(f"removed {store.clear()} tuned kernels from {store.folder()}")
    if show:
        show_store()
    if clear or show:
        return
    if not target:
        raise typer.BadParameter("--target is missing: a model's name or folder")
    methods = [make_method(method, part, options or (), window=window, lookahead=lookahead) for part in counts(budget)]
    work, aten = plan(target, draft, methods, arch, dtype, batch, prompt, max_new_tokens)
    for folder in ([Path(emit_path)] if emit_path else []) + ([Path(json_path).parent] if json_path else []):
        check_folder(folder)  # before the work, not after
    found = run(work, tiles, jobs)
    if emit_path:
        emit_modules(found, Path(emit_path))
        typer.echo(f"wrote {len(found)} modules to {emit_path}")
    if json_path:
        write_file(Path(json_path), json.dumps([*map(describe, found), *aten], indent=1) + "\n")
        typer.echo(f"wrote {json_path}")


def counts(budget: str) -> list[int]:
    """Budgets from text, ascending.

    Raises: BudgetError: something else than counts; a ratio has no shape before there is a prompt.
    """
    parts = [part.strip() for part in budget.split(",")]
    if not all(part.isdigit() for part in parts):
        raise BudgetError(f"budget={budget!r}: expected counts separated by commas, e.g. 256,512,1024.")
    return sorted(set(map(int, parts)))


def plan(
    target: str, draft: str, methods: list[Method], arch: str, dtype: str, batch: int, prompt: int, max_new_tokens: int
) -> tuple[list[Job], list[dict[str, Any]]]:
    """What to tune, and entries for what stays with torch's operators."""
    from transformers import AutoConfig

    from specpass.cache.layer import round_room
    from specpass.hub import model_path
    from specpass.kernels.archs import ARCHS, device_arch
    from specpass.kernels.dispatch import ATEN_OPERATORS, triton_installed
    from specpass.kernels.shapes import DTYPES
    from specpass.tune.jobs import Layer, draft_jobs, target_jobs

    if not triton_installed():
        raise TritonMissingError("tune compiles with Triton, which is not installed: pip install 'specpass[triton]'.")
    name = arch or device_arch() or "sm_90"
    if name not in ARCHS:
        raise UnknownArchError(f"arch={name!r}: expected one of {', '.join(ARCHS)}.")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    config = AutoConfig.from_pretrained(model_path(target)).get_text_config(decoder=True)
    own = Layer.of(config, batch, dtype)
    drafts = Layer.of(AutoConfig.from_pretrained(model_path(draft)), batch, dtype) if draft else None
    jobs = []
    for method in methods:
        # None stands for the generation's length, as in generate.
        lookahead = max_new_tokens if method.lookahead is None else method.lookahead
        jobs += target_jobs(own, config.num_hidden_layers, method, name, prompt, lookahead, round_room(max_new_tokens))
        if drafts is not None:
            jobs += draft_jobs(drafts, method, name, prompt, lookahead)
    aten = [
        {
            "kernel": operator,
            "arch": name,
            "dtype": dtype,
            "shapes": None,
            "config": None,
            "regs": None,
            "spills": None,
            "shared_bytes": None,
            "measured": False,
            "reason": reason,
        }
        for operator, reason in ATEN_OPERATORS.items()
    ]
    return list(dict.fromkeys(jobs)), aten


def run(work: list[Job], count: int, processes: int) -> list[Entry]:
    """Tune what the store does not have, with a progress bar; returns all entries, in order."""
    from specpass.kernels import cost, tuner
    from specpass.kernels.archs import ARCHS

    for job in work:
        if job.refused is not None:
            console.print(f"{job.kernel}: stays with torch's operators: {job.refused}")
    work = [job for job in work if job.refused is None]
    measure = bool(work) and tuner.can_measure(work[0].arch)
    found = {job: entry for job in work if (entry := tuner.finished(job, measure)) is not None}
    todo = [job for job in work if job not in found]
    if not todo:
        console.print(f"nothing to do: all {len(work)} kernels are in the store")
        return list(found.values())
    if found:
        console.print(f"{len(found)} of {len(work)} kernels are in the store")
    if not measure:
        console.print(
            f"no {todo[0].arch} GPU here: tiles are compiled, ranked by the cost model, not measured, and "
            "their numbers are not checked on a device"
        )
    lists = {job: cost.shortlist(job.kernel, job.shapes, ARCHS[job.arch], count) for job in todo}
    with workers(processes) as pool, _progress() as progress:
        bar = progress.add_task("", total=sum(map(len, lists.values())))
        try:
            for job, tiles in lists.items():
                progress.update(bar, description=f"{job.kernel} {job.shapes.budget or ''}")
                found[job] = tuner.tune(job, tiles, pool, measure, lambda: progress.advance(bar))
        except KeyboardInterrupt:
            console.print("cut off: what was compiled is kept; the same command goes on from here")
            raise typer.Exit(130) from None
    console.print(f"tuned {len(todo)} kernels")
    return [found[job] for job in work]


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Executor | None]:
    """Compiler processes; None, which compiles here, where one is enough. They leave Ctrl-C to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = processes or cores
    if wanted == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        wanted, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def describe(entry: Entry) -> dict[str, Any]:
    """A winner as JSON. `config` is null where no tile fits: the table's tile, or torch's operator, serves."""
    winner = entry.winner
    base: dict[str, Any] = {
        "kernel": entry.key.kernel,
        "arch": entry.key.arch,
        "dtype": entry.key.shapes.dtype,
        "shapes": dataclasses.asdict(entry.key.shapes),
        "triton": entry.key.triton,
        "config": None if winner is None else dataclasses.asdict(winner.tile),
    }
    if winner is None:
        return {**base, "regs": None, "spills": None, "shared_bytes": None, "measured": False}
    base |= {
        "regs": winner.regs,
        "spills": winner.spills,
        "shared_bytes": winner.shared_bytes,
        "measured": entry.measured,
        "predicted_us": round(winner.predicted_s * 1e6, 2),
    }
    if winner.time_us is not None:
        base |= {"time_us": winner.time_us, "warm_us": winner.warm_us}
    return base


def emit_modules(found: list[Entry], folder: Path) -> None:
    """Write the module of each winner: the kernel with this site's constants bound."""
    from specpass.kernels.emit import emit
    from specpass.kernels.registry import REGISTRY

    for entry in found:
        if entry.winner is not None:
            kernel, shapes = entry.key.kernel, entry.key.shapes
            size = f"_{shapes.slots}" if shapes.slots else ""
            text = emit(REGISTRY[kernel], shapes, entry.winner.tile)
            write_file(folder / f"{kernel}{size}_{entry.key.arch}.py", text)


def show_store() -> None:
    """A table of all entries."""
    from specpass.kernels import store

    table = Table("kernel", "arch", "dtype", "heads x dim", "slots", "tile", "regs", "shared", "time")
    for entry in store.entries():
        shapes, winner = entry.key.shapes, entry.winner
        sizes = (f"{shapes.kv_heads} x {shapes.dim}", str(shapes.slots or "-"))
        if winner is None:
            table.add_row(entry.key.kernel, entry.key.arch, shapes.dtype, *sizes, "unfinished or none", "", "", "")
            continue
        tile = winner.tile
        time = "not measured" if winner.time_us is None else f"{winner.time_us:.1f} us"
        table.add_row(
            entry.key.kernel,
            entry.key.arch,
            shapes.dtype,
            *sizes,
            f"{tile.block_n}, {tile.block_m}, {tile.splits} splits, {tile.warps} warps, {tile.stages} stages",
            str(winner.regs),
            str(winner.shared_bytes),
            time,
        )
    Console(width=None if os.isatty(1) else 160).print(table)
    typer.echo(f"{table.row_count} in {store.folder()}")
