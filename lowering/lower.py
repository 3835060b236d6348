"""lower: a PRUNED graph becomes a callable."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from specpass.kernels.dispatch import Choice
from specpass.lowering.choose import choose_sites
from specpass.lowering.cuda_graph import GraphedStep, moving_inputs, on_cuda
from specpass.lowering.fuse import fuse
from specpass.rewrite import Observer, Request


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
    """

    run: Callable[..., Any]
    choices: tuple[tuple[str, Choice], ...]
    regions: int
    distinct_regions: int
    notes: tuple[str, ...]
    pass_seconds: dict[str, float]
    seconds: float


def prepare(lowering: str) -> None:
    """Start what can be made ready while the target is traced."""
    if lowering == "inductor":
        from specpass.lowering.inductor import compiler_probe

        compiler_probe()


def lower(
    gm: fx.GraphModule,
    lowering: str,
    request: Request,
    *,
    cudagraphs: bool = False,
    fingerprint: str = "",
    skip: Iterable[str] = (),
    observers: Iterable[Observer] = (),
    note: Callable[[str], None] = warnings.warn,
) -> Lowered:
    """`lowering="eager"` runs the operators one by one; "inductor" compiles the decoder layers' regions.

    Args:
        request: what the graph does, and for which method.
        cudagraphs: replay decode steps on CUDA as one CUDA graph.
        fingerprint: of the pipeline that made the graph; it goes into the keys of Inductor's caches.
        skip: names of fusion passes to leave out.
        observers: of the fusion passes.
        note: takes what there is to say of later calls.
    """
    start = time.perf_counter()
    graphed = cudagraphs and request.kind == "decode" and on_cuda(gm)
    moving = moving_inputs(gm)
    pass_seconds = fuse(gm, request, skip, observers)
    choices = tuple(choose_sites(gm))
    regions = distinct = 0
    if lowering == "inductor":
        from specpass.lowering.inductor import lower_regions, tagged

        with tagged(fingerprint):
            regions, distinct = lower_regions(gm, note)
    gm.recompile()
    seconds = time.perf_counter() - start
    run = GraphedStep(gm.forward, moving) if graphed else gm.forward
    notes = ("decode steps are replayed as one CUDA graph",) if graphed else ()
    return Lowered(run, choices, regions, distinct, notes, pass_seconds, seconds)
