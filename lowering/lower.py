"""lower: a PRUNED graph becomes a callable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from specpass.files import name_inductors_folder
from specpass.kernels.dispatch import Choice
from specpass.lowering.choose import choose_sites
from specpass.lowering.cuda_graph import GraphedModule, GraphedStep, input_kinds, on_cuda, operand_kinds
from specpass.lowering.few_rows import linear_notes
from specpass.lowering.float32_linear import float32_notes
from specpass.lowering.fuse import fuse
from specpass.observe import progress
from specpass.rewrite import Kind, Observer, Request
from specpass.rewrite.base import PROMPTS, STEPS


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A callable, and how it came about.

    Attributes:
        run: takes the graph's inputs, in their order.
        choices: (module path, kernel or aten and why) of each operator that could be a kernel.
        regions: decoder layers that became calls.
        distinct_regions: what was compiled for them.
        notes: what else there is to say.
        pass_seconds: of each fusion pass.
        seconds: wall-clock time.
        work: of the compiled layers of one call, as `progress.advance` is told of it; 0 where none is compiled.
    """

    run: Callable[..., Any]
    choices: tuple[tuple[str, Choice], ...]
    regions: int
    distinct_regions: int
    notes: tuple[str, ...]
    pass_seconds: dict[str, float]
    seconds: float
    work: int


def prepare(lowering: str) -> None:
    """Start what can be made ready while the target is traced."""
    if lowering == "inductor":
        from specpass.lowering.inductor import compiler_probe

        name_inductors_folder()
        compiler_probe()


def lower(
    gm: fx.GraphModule,
    lowering: str,
    request: Request,
    *,
    cudagraphs: bool = True,
    fingerprint: str = "",
    skip: Iterable[str] = (),
    observers: Iterable[Observer] = (),
    note: Callable[[str], None] = lambda text: None,
) -> Lowered:
    """`lowering="eager"` runs the operators one by one; "inductor" compiles the decoder layers' regions.

    Args:
        request: what the graph does, and for which method.
        cudagraphs: on CUDA, replay decode steps, and a draft's, as one CUDA graph each.
        fingerprint: of the pipeline that made the graph; it goes into the keys of Inductor's caches.
        skip: names of fusion passes to leave out.
        observers: of the fusion passes.
        note: told what turns out only when the graph runs.
    """
    start = time.perf_counter()
    graphs = cudagraphs and on_cuda(gm)
    pass_seconds = fuse(gm, request, skip, observers)
    choices = tuple(choose_sites(gm))
    notes = linear_notes(gm) if request.kind in STEPS else float32_notes(gm)
    regions = distinct = work = 0
    if lowering == "inductor":
        from specpass.lowering.inductor import distinct_regions, lower_regions, tagged, work_of

        count = distinct_regions(gm) if progress.watched() else None
        with tagged(fingerprint), progress.task("layers", count):
            regions, distinct = lower_regions(gm, note, prompt=request.kind in PROMPTS)
        work = work_of(gm)
    if graphs and graph_subgraphs(gm, note):
        notes.append("the draft's steps are replayed as one CUDA graph")
    gm.recompile()
    run: Callable[..., Any] = gm.forward
    if graphs and request.kind == "decode":
        run = GraphedStep(gm.forward, input_kinds(gm), refused=refusal("decode steps", note))
        notes.append("decode steps are replayed as one CUDA graph")
    if regions and request.kind in PROMPTS and not on_cuda(gm):
        from specpass.lowering.reuse_blocks import reuse_blocks

        run = reuse_blocks(run)
    seconds = time.perf_counter() - start
    return Lowered(run, choices, regions, distinct, tuple(notes), pass_seconds, seconds, work)


def lower_draft(
    gm: fx.GraphModule,
    lowering: str,
    sizes: Iterable[Any],
    *,
    cudagraphs: bool = True,
    fingerprint: str = "",
    skip: Iterable[str] = (),
    note: Callable[[str], None] = lambda text: None,
    kind: Kind = "append",
) -> Callable[..., Any]:
    """A graph of the draft's alone, compiled for calls of such `sizes`.

    Args:
        sizes: of the first call, one for each input: a tensor, or a number.
        kind: "append" for its own tokens (see passes/propose.py), "prefill" for a prompt.
    """
    graphs = cudagraphs and on_cuda(gm)
    fuse(gm, Request(kind, model="draft"), skip)
    if lowering == "inductor":
        from specpass.lowering.inductor import hints_of, lower_regions, tagged

        with tagged(fingerprint):
            lower_regions(gm, note, hints_of(gm, sizes), prompt=kind in PROMPTS)
    if graphs:
        graph_subgraphs(gm, note)
    gm.recompile()
    return gm.forward


def graph_subgraphs(gm: fx.GraphModule, note: Callable[[str], None]) -> bool:
    """Let each subgraph that is called again and again (a draft's step) record itself; False where there is none.

    Graphs that share a subgraph share its recordings.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    graphed = False
    for name, nodes in calls.items():
        step = gm.get_submodule(name)
        if len(nodes) == 1 or not isinstance(step, fx.GraphModule):
            continue
        if "specpass_graphed" not in step.meta:
            own = GraphedStep(step.forward, operand_kinds(nodes[0]), keeps=False, refused=refusal("draft steps", note))
            step.meta["specpass_graphed"] = GraphedModule(own)
        setattr(gm, name, step.meta["specpass_graphed"])
        graphed = True
    return graphed


def refusal(steps: str, note: Callable[[str], None]) -> Callable[[str], None]:
    return lambda why: note(f"{steps} cannot be recorded as a CUDA graph ({why}): they run operator by operator")
