"""The parts of bench/gpu.py that time single kernels."""

from __future__ import annotations

import dataclasses
import gc
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_peers import peers
from specpass.kernels import cost, measure
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel, find_tile

if TYPE_CHECKING:
    from bench.gpu import Run

# A layer of Llama-3.1-8B; 8 * 64 * 1280 and 8 * 65,536 are 655,360 and 524,288 slots.
LARGE = Shapes("bfloat16", 64, 8, 4, 128, 128, rows=64, window=32, budget=1024, room=256, columns=65536)
SMALL = Shapes("float32", 2, 2, 3, 16, 16, rows=6, window=4, budget=20, room=12, columns=64)


def describe_device(device: str) -> dict[str, Any]:
    """The device's name and memory."""
    if not device.startswith("cuda"):
        return {"name": platform.processor() or platform.machine()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "processors": found.multi_processor_count,
    }


def free(device: str) -> None:
    """Give back what the last step held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def sizes(run: Run, kernel: Kernel) -> Shapes:
    """Shapes to time a kernel at: one long sequence where it reads a prompt's columns, a batch where it reads slots."""
    if run.tiny:
        return SMALL
    if kernel.work == "columns":
        return dataclasses.replace(LARGE, batch=1)
    return dataclasses.replace(LARGE, columns=4096)


def correctness(run: Run) -> None:
    """Largest error of each kernel as a share of its tolerance (at most 1 is right), for several dtypes and shapes."""
    shapes = (
        [SMALL]
        if run.tiny
        else [
            dataclasses.replace(SMALL, columns=1024, dim=64, value_dim=64, budget=200, room=56),
            dataclasses.replace(LARGE, batch=2, columns=8192),
            dataclasses.replace(LARGE, batch=1, columns=2048, dtype="float16", dim=80, value_dim=80, group=7),
        ]
    )
    for kernel in REGISTRY.values():
        variants = [
            dataclasses.replace(shapes[-1 if turn % 2 else 0], **changes)
            for turn, changes in enumerate(kernel.variants)
        ]
        for index, each in enumerate([*shapes, *variants]):
            run.step(
                "correctness",
                label(kernel, each),
                lambda kernel=kernel, each=each, index=index: {
                    "error_share": round(measure.check(measure.make_case(kernel, each, run.device, seed=index)), 4)
                },
            )


def label(kernel: Kernel, shapes: Shapes) -> str:
    """A kernel and what sets these shapes apart."""
    name = f"{kernel.name}, {shapes.dtype}, D {shapes.dim}, G {shapes.group}"
    if kernel.operator == "importance":
        name += f", {shapes.reduce}{' of weighted rows' if shapes.weighted else ''}"
    return name + f"{', soft cap' if shapes.softcap else ''}{', sinks' if shapes.sinks else ''}"


def rates(run: Run) -> dict[str, float]:
    """Measured copy bandwidth (bytes/s, read and written) and 16-bit matmul rate (FLOP/s)."""
    size, side = (2**20, 128) if run.tiny else (2**30, 8192)
    source = torch.randn(size // 4, device=run.device)
    target = torch.empty_like(source)
    # By a kernel: a recorded copy_ is the copy engine's, and a third slower.
    copy = measure.time_us(lambda: torch.neg(source, out=target), run.device, cold=False)
    a = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    matmul = measure.time_us(lambda: a @ a, run.device, cold=False)
    return {"copy_bytes_s": 2e6 * size / copy, "matmul_flop_s": 2e6 * side**3 / matmul}


def measure_rates(run: Run) -> dict[str, float]:
    return run.step("rates", "device", lambda: rates(run))


def floors(run: Run) -> None:
    """Each kernel cold and warm, its floor, and what else does the same on this device."""
    measured = measure_rates(run)
    if "copy_bytes_s" not in measured:
        return
    for kernel in REGISTRY.values():
        run.step("floors", kernel.name, lambda kernel=kernel: against_floor(run, kernel, measured))


def against_floor(run: Run, kernel: Kernel, measured: dict[str, float]) -> dict[str, Any]:
    """Times in microseconds. `of_floor` is time over floor; `bandwidth_share` is floor bytes over the copy's rate."""
    shapes = sizes(run, kernel)
    case = measure.make_case(kernel, shapes, run.device)
    tile = find_tile(kernel, shapes, torch.device(run.device))
    moved, flops = (cost.evaluate(form, shapes, tile) for form in (kernel.least.bytes, kernel.least.flops))
    floor = 1e6 * max(moved / measured["copy_bytes_s"], flops / measured["matmul_flop_s"])
    back = measure.rewind(case)
    cold, warm = (
        measure.time_us(lambda: measure.run(case), run.device, cold=flag, before=back) for flag in (True, False)
    )
    found = {
        "cold_us": cold,
        "warm_us": warm,
        "floor_us": floor,
        "of_floor": cold / floor,
        "bandwidth_share": 1e6 * moved / measured["copy_bytes_s"] / cold,
        "slots": shapes.heads * (shapes.columns if kernel.work == "columns" else shapes.slots),
        "tile": str(tile),
    }
    found["peers_us"] = {name: time_or_why(call, run.device, back) for name, call in peers(case).items()}
    return found


def time_or_why(call: Callable[[], Any], device: str, before: Callable[[], None]) -> float | str:
    try:
        return measure.time_us(call, device, cold=True, before=before, repeats=15)
    except Exception as error:  # a peer that does not run here is no failure of ours
        return f"{type(error).__name__}: {error}"[:200]


def full_kv(run: Run) -> None:
    """The attention of one decode step at 128k tokens, batch 1: C = 1024 against SDPA over the full KV."""

    def compare() -> dict[str, Any]:
        pruned = SMALL if run.tiny else dataclasses.replace(LARGE, batch=1)
        whole = dataclasses.replace(pruned, budget=256 if run.tiny else 131072)
        case, long = (measure.make_case(REGISTRY["decode"], each, run.device) for each in (pruned, whole))
        query, keys, values, scale = (long.operands[name] for name in ("query", "keys", "values", "scale"))
        ours = measure.time_us(lambda: measure.run(case), run.device, cold=True)
        theirs = measure.time_us(
            lambda: scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True),
            run.device,
            cold=True,
        )
        return {"pruned_us": ours, "full_sdpa_us": theirs, "times_faster": theirs / ours, "slots": whole.slots}

    run.step("full_kv", "decode attention", compare)
