"""lower: a PRUNED graph becomes a callable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import fx

from specpass.lowering.choose import choose_sites
from specpass.reporting import GraphRecord


def prepare(lowering: str) -> None:
    """Start what can be made ready while the target is traced."""
    if lowering == "inductor":
        from specpass.lowering.inductor import compiler_probe

        compiler_probe()


def lower(gm: fx.GraphModule, lowering: str, record: GraphRecord) -> Callable[..., Any]:
    """`lowering="eager"` runs the operators' references one by one; "inductor" compiles the decoder layers' regions."""
    start = time.perf_counter()
    record.choices = choose_sites(gm)
    if lowering == "inductor":
        from specpass.lowering.inductor import lower_regions

        gm = lower_regions(gm, record)
    gm.recompile()
    record.lower_seconds = time.perf_counter() - start
    return gm.forward
