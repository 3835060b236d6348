"""lower: a PRUNED graph becomes a callable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import fx

from specpass.lowering.choose import choose_sites
from specpass.lowering.cuda_graph import GraphedStep, moving_inputs, on_cuda
from specpass.lowering.fuse import fuse
from specpass.reports.record import GraphRecord
from specpass.rewrite import Request


def prepare(lowering: str) -> None:
    """Start what can be made ready while the target is traced."""
    if lowering == "inductor":
        from specpass.lowering.inductor import compiler_probe

        compiler_probe()


def lower(
    gm: fx.GraphModule, lowering: str, record: GraphRecord, cudagraphs: bool = False, fingerprint: str = ""
) -> Callable[..., Any]:
    """`lowering="eager"` runs the operators one by one; "inductor" compiles the decoder layers' regions.

    `cudagraphs` replays decode steps on CUDA as one CUDA graph. `fingerprint` of the pipeline goes into the keys of
    Inductor's caches.
    """
    start = time.perf_counter()
    graphed = cudagraphs and record.kind == "decode" and on_cuda(gm)
    moving = moving_inputs(gm)
    fuse(gm, Request(record.kind))
    record.choices = choose_sites(gm)
    if lowering == "inductor":
        from specpass.lowering.inductor import lower_regions, tagged

        with tagged(fingerprint):
            gm = lower_regions(gm, record)
    gm.recompile()
    record.lower_seconds = time.perf_counter() - start
    if graphed:
        record.notes.append("decode steps are replayed as one CUDA graph")
        return GraphedStep(gm.forward, moving)
    return gm.forward
