"""Peak memory of a prefill as the prompt grows: specpass holds one layer's full K/V, not all layers', and of KV heads
that share budgets each layer's candidates.

Each figure is one fresh process: load, prefill a short prompt (compiles, warms up), reset the kernel's high-
water mark, prefill S tokens, read the mark. Growth per token is the slope between the shortest and the
longest prompt. Activations grow with S too, so a prefill that keeps no K/V at all ("none", use_cache=False)
runs beside: what an engine grows above it is its K/V.

    python -m bench.memory
    python -m bench.memory --engines specpass global best --lengths 2048 8000 --out FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import common

SPREADS: dict[str, dict[str, Any]] = {
    "specpass": {},
    "global": {"spread": "global"},
    "best": {"spread": "global", "reconstruction": True},
}
ENGINES = ("none", "full", *SPREADS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=(2048, 4096, 8000))
    parser.add_argument("--warmup", type=int, nargs="+", default=(640, 768), help="prompt lengths run before")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--lookahead", type=int, default=32, help="given lookahead ids: no draft's own memory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=("none", "full", "specpass"))
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "memory.json")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    return parser.parse_args()


def status(field: str) -> int:
    """A field of /proc/self/status in bytes, e.g. VmHWM (peak) or VmRSS (now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def prefill(model: Any, engine: str, method: Any, length: int) -> Any:
    """Prefill a random prompt of `length` tokens; returns the cache, or None where nothing is kept."""
    import torch
    from transformers import DynamicCache

    ids = torch.randint(100, 20_000, (1, length), generator=torch.Generator().manual_seed(length))
    if engine == "none":
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return None
    if engine == "full":
        cache: Any = DynamicCache(config=model.config)
    else:
        import specpass

        cache = specpass.BudgetCache(model.config, method, max_new_tokens=64)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


def child(args: argparse.Namespace) -> None:
    """Peak above the resting size for one engine and one prompt length; the last line printed is JSON."""
    import torch

    model, method = common.load_model(args.target, args.dtype), None
    if args.child in SPREADS:
        import specpass

        lookahead = [list(range(100, 100 + args.lookahead))]
        method = specpass.SpecKV(budget=args.budget, lookahead_ids=lookahead, **SPREADS[args.child])
        model = specpass.compile(model, method=method, lowering=args.lowering)
    with torch.no_grad():
        for length in args.warmup:
            prefill(model, args.child, method, length)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        rest = status("VmRSS")
        cache = prefill(model, args.child, method, args.lengths[0])
    print(json.dumps({"rest": rest, "peak": status("VmHWM") - rest, "kept_cache": cache is not None}))


def measure(engine: str, length: int, args: argparse.Namespace) -> int:
    """Peak bytes above rest of one fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--child", engine, "--lengths", str(length), "--warmup"]
    command += [*map(str, args.warmup), "--target", args.target, "--dtype", args.dtype]
    command += ["--budget", str(args.budget), "--lookahead", str(args.lookahead), "--lowering", args.lowering]
    # every larger block by mmap: freed memory goes back at once, so the mark shows what is alive
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    print(f"{engine:9} S {length:5}: {peak / 2**20:8.1f} MiB above rest", flush=True)
    return peak


def kv_bytes_per_token(target: str, dtype: str) -> tuple[int, int]:
    """(one layer's, all layers') K/V bytes of one token."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(common.model_folder(target))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    one = 2 * config.num_key_value_heads * size * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    return one, one * config.num_hidden_layers


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    if len(set(args.lengths)) < 2:
        raise SystemExit(
            f"--lengths {args.lengths[0]}: growth is told by two lengths at least, e.g. --lengths 2048 8192."
        )
    peaks = {engine: {n: measure(engine, n, args) for n in args.lengths} for engine in args.engines}
    low, high = min(args.lengths), max(args.lengths)
    growth = {engine: round((found[high] - found[low]) / (high - low), 1) for engine, found in peaks.items()}
    one, every = kv_bytes_per_token(args.target, args.dtype)
    parts: dict[str, Any] = {"peak_bytes": peaks, "growth_bytes_per_token": growth}
    if "none" in growth:
        parts["growth_above_none"] = {engine: round(value - growth["none"], 1) for engine, value in growth.items()}
    parts |= {"one_layer_kv_bytes_per_token": one, "all_layers_kv_bytes_per_token": every}
    settings = {k: getattr(args, k) for k in ("budget", "lookahead", "dtype", "lowering")}
    common.save_results(args.out, settings | {"target": Path(args.target).name}, **parts)
    print({key: parts[key] for key in parts if key != "peak_bytes"})


if __name__ == "__main__":
    main()
