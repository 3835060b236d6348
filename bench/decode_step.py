"""Time of a decode step after a long and after a short prompt, at the same budget: it should not differ.

Steps are timed between tokens of `model.generate`, as a user's streamer sees them. Long and short prompts
alternate, so that a busy machine slows both. Beside the medians stands the floor that memory sets: the bytes
that a step must read (weights once, C + N slots of K/V) over the measured bandwidth.

    python -m bench.decode_step
    python -m bench.decode_step --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b --method speckv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--draft", default=None, help="name or folder; needed by speckv")
    parser.add_argument("--method", choices=("snapkv", "speckv"), default="snapkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=8000, help="prompt and new tokens must fit the context")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="also time the plain model with full KV")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "decode_step.json")
    return parser.parse_args()


def generate(model: Any, length: int, steps: int) -> tuple[list[float], Any]:
    """(milliseconds per step, the cache) of a generation after a random prompt of `length` tokens."""
    import torch

    from specpass.observe.streaming import Clock

    ids = torch.randint(100, 20_000, (1, length), generator=torch.Generator().manual_seed(length))
    clock = Clock()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        return_dict_in_generate=True,
    )
    return [1000 * seconds for seconds in clock.steps], out.past_key_values


def alternate(model: Any, lengths: tuple[int, ...], steps: int, rounds: int) -> tuple[dict[int, list[float]], Any]:
    """Step times per prompt length over `rounds` alternating generations, after one that warms up."""
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for length in lengths:
        generate(model, length, steps)
    for _ in range(rounds):
        for length in lengths:
            found, cache = generate(model, length, steps)
            times[length] += found
    return times, cache


def figures(model: Any, times: dict[int, list[float]], cache: Any, bandwidth: float) -> dict[str, Any]:
    """Medians, their ratio (long over short), and the floor in ms for the cache after the last run."""
    from specpass.observe.storage import step_weight_bytes

    short, long = sorted(times)
    medians = {f"ms_after_{length}": common.median(times[length], 3) for length in (short, long)}
    weights = step_weight_bytes(model)
    kv = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        **medians,
        "ratio": round(common.median(times[long], 6) / common.median(times[short], 6), 4),
        "steps_each": len(times[short]),
        "weight_bytes": weights,
        "kv_bytes_after_long": kv,
        "floor_ms_after_long": round(1000 * (weights + kv) / bandwidth, 3),
    }


def main() -> None:
    args = arguments()
    target = common.load_model(args.target)
    draft = common.load_model(args.draft) if args.draft else None
    import specpass
    from specpass.benchmarks.speed.rates import bandwidth

    lengths, rate = (args.short, args.long), bandwidth("cpu")
    engines: dict[str, Any] = {}
    if args.full:
        engines["full"] = figures(target, *alternate(target, lengths, args.steps, args.rounds), rate)

    if args.method == "snapkv":
        method: Any = specpass.SnapKV(budget=args.budget)
    else:
        method = specpass.SpecKV(budget=args.budget, lookahead=32)
    model = specpass.compile(target, draft=draft, method=method, lowering=args.lowering)
    engines["specpass"] = figures(model, *alternate(model, lengths, args.steps, args.rounds), rate)

    settings = {k: getattr(args, k) for k in ("method", "budget", "steps", "rounds", "lowering")}
    settings |= {"target": Path(args.target).name, "draft": args.draft and Path(args.draft).name}
    for engine, found in engines.items():
        print(engine, found)
    common.save_results(args.out, settings, bytes_per_second=round(rate), engines=engines)


if __name__ == "__main__":
    main()
