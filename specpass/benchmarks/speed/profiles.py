"""Where time goes: a call's operators by group, as shares of its wall time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

GROUPS = {
    "matrix products": r"mm$|bmm$|addmm|linear|mkldnn|onednn|gemm|matmul|mkl_",
    "attention": r"attention|flash",
    "fused pointwise": r"graph_\d|cpp_fused|triton_",
    "selection": r"topk|sort|gather|index|max_pool|avg_pool|scatter|softmax",
    "copies": r"copy_|cat$|clone|to_copy|contiguous|fill_|zero",
}


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the call, and what share of it each group of operators took by itself; "other" is the rest.

    The rest is Python, dispatch and operators of no group. The profiler itself slows small operators down.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    totals = dict.fromkeys(GROUPS, 0.0)
    for event in recorded.key_averages():
        group = next((name for name, words in GROUPS.items() if re.search(words, event.key)), None)
        if group:
            totals[group] += event.self_cpu_time_total / 1e6
    found = {name: round(total / seconds, 4) for name, total in totals.items()}
    return {"seconds": round(seconds, 3), **found, "other": round(max(0.0, 1 - sum(found.values())), 4)}
