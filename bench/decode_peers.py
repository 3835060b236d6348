"""A decode step behind equally many slots: ours, transformers' compiled static cache, kvpress's SnapKV; by turns.

Ours and transformers' take a few steps each by turns in one process. kvpress pins an older transformers, so its step
stands there as what it is, transformers' uncompiled step over a DynamicCache of as many slots, and kvpress itself is
measured in its own environment before and after. Random keys and values: a step's time does not depend on them.

    python -m bench.decode_peers
    python -m bench.decode_peers --targets smollm2-135m --batches 1 --no-kvpress
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common

OURS, STATIC, EAGER = "specpass_snapkv", "full_static_compiled", "full_eager"
TURNS, STEPS, WARM_UP = 8, 4, 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"])
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--no-kvpress", action="store_true")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "decode_peers.json")
    return parser.parse_args()


def kvpress(target: str, slots: int, batch: int) -> float:
    """Milliseconds of a step of kvpress's SnapKV, behind a prompt of which it kept `slots`."""
    from specpass.benchmarks.models import Pair
    from specpass.benchmarks.peers import run

    found = run.speed(Pair(target, target, "bfloat16", "cpu", "inductor"), 4 * slots, batch, slots, TURNS * STEPS, 0)
    return 1000 * batch / found["decode_tokens_per_s"]


def by_turns(target: str, slots: int, batch: int) -> dict[str, Any]:
    """Medians of the three, their ratios, and the floor: bytes that a step must read over the measured bandwidth."""
    import torch

    from specpass.benchmarks.speed.child import Engine
    from specpass.benchmarks.speed.rates import bandwidth
    from specpass.observe.storage import cache_bytes, step_weight_bytes

    job = {"target": target, "draft": target, "dtype": "bfloat16", "device": "cpu", "lowering": "inductor"}
    job |= {"batch": batch, "budget": slots, "steps": (TURNS + 1) * (STEPS + 1) + WARM_UP}
    engines = {name: Engine({**job, "method": name, "length": slots}) for name in (OURS, STATIC, EAGER)}
    with torch.no_grad():
        caches = {name: engine.filled_cache() for name, engine in engines.items()}
        for name, engine in engines.items():
            engine.decode_seconds(caches[name], WARM_UP)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(TURNS):
            for name, engine in engines.items():
                seconds[name] += engine.decode_seconds(caches[name], STEPS)
    medians = {name: common.median((1000 * each for each in found), 2) for name, found in seconds.items()}
    rate, read = bandwidth("cpu"), step_weight_bytes(engines[OURS].model) + cache_bytes(caches[OURS])
    return {
        "ms": medians,
        "over_static": round(medians[OURS] / medians[STATIC], 3),
        "over_eager": round(medians[OURS] / medians[EAGER], 3),
        "bytes": read,
        "bytes_per_second": round(rate),
        "floor_ms": round(1000 * read / rate, 2),
        "over_floor": round(medians[OURS] / (1000 * read / rate), 3),
    }


def main() -> None:
    args = arguments()
    found: dict[str, Any] = {}
    for target, batch in track([(target, batch) for target in args.targets for batch in args.batches], "steps"):
        before = None if args.no_kvpress else kvpress(target, args.slots, batch)
        entry = by_turns(target, args.slots, batch)
        if before is not None:
            theirs = [before, kvpress(target, args.slots, batch)]
            entry["kvpress_ms"] = [round(each, 2) for each in theirs]
            entry["over_kvpress"] = round(entry["ms"][OURS] / common.median(theirs), 3)
        found[f"{Path(target).name}, batch {batch}"] = entry
        print(found)
    common.save_results(args.out, {"slots": args.slots, "turns": TURNS, "steps": STEPS}, steps=found)


if __name__ == "__main__":
    main()
