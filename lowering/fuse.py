"""Rows that nobody reads go, and two operators become one where the second can use what the first has at hand."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from specpass.dialect.cache import AppendKv
from specpass.graph.edit import copy_module
from specpass.lowering.dense_rows import DenseRows
from specpass.lowering.few_rows import FewRows
from specpass.lowering.float32_linear import Float32Linear
from specpass.lowering.fuse_append import FuseAppend
from specpass.lowering.share_lse import ShareLse
from specpass.lowering.share_step_lse import ShareStepLse
from specpass.lowering.take_early import TakeEarly
from specpass.rewrite import Facts, Kind, Observer, Pass, Pipeline, Request

FUSION: tuple[Pass, ...] = (
    TakeEarly(),
    DenseRows(),
    ShareLse(),
    FuseAppend(),
    ShareStepLse(),
    FewRows(),
    Float32Linear(),
)


def fuse(
    gm: fx.GraphModule, request: Request, skip: Iterable[str] = (), observers: Iterable[Observer] = ()
) -> dict[str, float]:
    """Fuse a PRUNED graph in place, the graphs that it calls (the draft's) too.

    Those are shared by the target's graphs, so fused copies take their place, made once and kept beside them.

    Returns: seconds of each pass over `gm`.
    """
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            fused = child.meta.get("specpass_fused")
            if fused is None:
                fused = copy_module(child)
                kind: Kind = "decode" if AppendKv.find(child.graph) else "prefill"
                fuse(fused, Request(kind, model="draft"), skip, observers)
                child.meta["specpass_fused"] = fused
            setattr(gm, name, fused)
    pipeline = Pipeline(FUSION, entry="PRUNED", skip=skip, observers=observers)
    pipeline.run(gm, request, Facts())
    return pipeline.seconds
