"""`specpass tune`: find tiles for a model's kernels and keep them where compiled models look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specpass.cli.options import MODELS, Lookahead, MaxNewTokens, MethodName, Options, Revision, Trust, Window, example
from specpass.errors import BudgetError, TritonMissingError, UnknownArchError
from specpass.files import check_folder, tiles_dir, write_file
from specpass.methods.base import Method
from specpass.methods.registry import make_method

if TYPE_CHECKING:
    from specpass.kernels.archs import Arch
    from specpass.kernels.tuner import Job


ORDER = 4


def add(app: typer.Typer) -> None:
    app.command(epilog=example("specpass tune -t qwen2.5-coder-1.5b -b 256,512 --arch sm_90 --json tiles.json"))(tune)


def tune(
    target: Annotated[str, typer.Option("--target", "-t", help=f"A {MODELS}; only its config is read.")] = "",
    draft: Annotated[str, typer.Option("--draft", "-d", help=f"The draft, to tune its kernels too: a {MODELS}.")] = "",
    method: MethodName = "speckv",
    budget: Annotated[str, typer.Option("--budget", "-b", help="Budgets C, separated by commas.")] = "256,512,1024",
    arch: Annotated[str, typer.Option(help="sm_80, sm_89, sm_90, gfx942, ...; default: the GPU here, or sm_90.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt length in tokens: its order of magnitude.")] = 32_000,
    window: Window = None,
    lookahead: Lookahead = None,
    options: Options = None,
    max_new_tokens: MaxNewTokens = 256,
    revision: Revision = None,
    trust_remote_code: Trust = False,
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
    from specpass.tune.entries import describe, emit_modules, show_store

    store.use(folder=tiles_dir, write=write_file)
    if clear:
        typer.echo(f"removed {store.clear()} tuned kernels from {store.folder()}")
    if show:
        show_store()
    if clear or show:
        return
    if not target:
        raise typer.BadParameter("is missing: name a model.", param_hint="--target")
    methods = [make_method(method, part, options or (), window=window, lookahead=lookahead) for part in counts(budget)]
    from specpass import hub

    target = hub.at_revision(target, revision)
    work, aten = plan(target, draft, methods, arch, dtype, batch, prompt, max_new_tokens, trust_remote_code)
    for folder in ([Path(emit_path)] if emit_path else []) + ([Path(json_path).parent] if json_path else []):
        check_folder(folder)  # before the work, not after
    from specpass.tune.run import console, run  # imports torch, which showing the store needs not

    try:
        found = run(work, tiles, jobs)
    except KeyboardInterrupt:
        console.print("cut off: what was compiled is kept; the same command goes on from here")
        raise typer.Exit(130) from None
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


def choose_arch(name: str) -> Arch:
    """The architecture of this name, or the GPU here, which its own properties describe; sm_90 without either.

    Raises: UnknownArchError: no GPU here and no data sheet says what it is, or Triton does not compile for it.
    """
    from specpass.kernels.archs import ARCHS, device_arch
    from specpass.kernels.dispatch import refuse_arch

    here = device_arch()
    known = ARCHS if here is None else {**ARCHS, here.name: here}
    arch = known.get(name) if name else here or ARCHS["sm_90"]
    if arch is None:
        raise UnknownArchError(
            f"arch={name!r}: expected one of {', '.join(known)}. For another GPU run tune where it is, without --arch: "
            "its own properties describe it."
        )
    reason = refuse_arch(arch)
    if reason is not None:
        fix = "" if arch.too_old else " Update Triton to tune for it."
        raise UnknownArchError(f"arch={arch.name!r}: {reason}; models run with torch's operators there.{fix}")
    return arch


def plan(
    target: str,
    draft: str,
    methods: list[Method],
    arch: str,
    dtype: str,
    batch: int,
    prompt: int,
    max_new_tokens: int,
    trust_remote_code: bool = False,
) -> tuple[list[Job], list[dict[str, Any]]]:
    """What to tune, and entries for what stays with torch's operators."""
    from specpass import hub
    from specpass.cache.layer import room_of
    from specpass.kernels.dispatch import ATEN_OPERATORS, triton_installed
    from specpass.kernels.shapes import DTYPES
    from specpass.tune.jobs import Layer, draft_jobs, target_jobs

    if not triton_installed():
        raise TritonMissingError("tune compiles with Triton, which is not installed: pip install 'specpass[triton]'.")
    chosen = choose_arch(arch)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}.", param_hint="--dtype")
    given: Any = {"trust_remote_code": trust_remote_code}
    config = hub.any_config(target, **given).get_text_config(decoder=True)
    own = Layer.of(config, batch, dtype)
    drafts = Layer.of(hub.any_config(draft, **given), batch, dtype) if draft else None
    jobs = []
    for method in methods:
        lookahead = method.look_ahead(max_new_tokens)
        jobs += target_jobs(own, config.num_hidden_layers, method, chosen, prompt, lookahead, room_of(max_new_tokens))
        if drafts is not None:
            jobs += draft_jobs(drafts, method, chosen, prompt, lookahead)
    aten = [
        {
            "kernel": operator,
            "arch": chosen.kind,
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
