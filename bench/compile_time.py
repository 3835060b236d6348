"""Compile time of a target and its draft, specpass against stock torch.compile, cold and with warm caches.

Every figure is one fresh process: the first generation minus a second, identical one, so that what is left
is tracing and compiling. "cold" starts with empty caches (Inductor's and specpass's own), "warm" is a second
process on the same folders. Without a draft (--draft "") the method is SnapKV. Stock compiles target and
draft, prefill and decode (Inductor, dynamic=True), with transformers' DynamicCache.

    python -m bench.compile_time
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help='name or folder; "" for SnapKV, without one')
    parser.add_argument("--tokens", type=int, default=1700, help="prompt length")
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", nargs="+", choices=("specpass", "stock"), default=("specpass", "stock"))
    parser.add_argument("--no-warm", action="store_true", help="cold runs only")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "compile_time.json")
    parser.add_argument("--child", choices=("specpass", "stock"), help=argparse.SUPPRESS)
    return parser.parse_args()


def prompt(length: int) -> Any:
    """Random prompt ids [1, S]."""
    import torch

    return torch.randint(100, 20_000, (1, length), generator=torch.Generator().manual_seed(0))


def specpass_call(args: argparse.Namespace) -> Callable[[], list[float]]:
    """A generation through specpass: draft, target, prefill and decode; returns each graph's seconds so far."""
    import torch

    import specpass

    target, draft = common.load_model(args.target, args.dtype), None
    method: specpass.Method = specpass.SnapKV(budget=args.budget)
    if args.draft:
        draft = common.load_model(args.draft, args.dtype)
        method = specpass.SpecKV(budget=args.budget, lookahead=args.lookahead)
    model, ids = specpass.compile(target, draft=draft, method=method), prompt(args.tokens)

    def call() -> list[float]:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return [round(graph.seconds, 2) for graph in specpass.report(model).graphs]

    return call


def stock_call(args: argparse.Namespace) -> Callable[[], list[float]]:
    """Prefill and decode steps of both models, each compiled by torch.compile as it comes."""
    import torch
    from transformers import DynamicCache

    models = [common.load_model(name, args.dtype) for name in (args.draft, args.target) if name]
    ids = prompt(args.tokens)
    for model in models:
        model.compile(backend="inductor", dynamic=True)

    @torch.no_grad()
    def call() -> list[float]:
        for model in models:
            cache = DynamicCache(config=model.config)
            token = ids
            for _ in range(args.new_tokens):
                logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
                token = logits[:, -1:].argmax(-1)
        return []

    return call


def child(args: argparse.Namespace) -> None:
    """Time the two calls and print them as the last line."""
    call = {"specpass": specpass_call, "stock": stock_call}[args.child](args)
    seconds = []
    for _ in range(2):
        since = time.perf_counter()
        graphs = call()
        seconds.append(time.perf_counter() - since)
    cpu = sum(os.times()[:4])  # children included: Inductor compiles C++ in worker processes
    found: dict[str, Any] = {
        "first_s": round(seconds[0], 2),
        "second_s": round(seconds[1], 2),
        "process_cpu_s": round(cpu, 1),
    }
    if graphs:  # from the traced model, or the file of an earlier process, to what runs
        found["graphs_s"] = graphs
    print(json.dumps({"compile_s": round(seconds[0] - seconds[1], 2), **found}))


def measure(engine: str, args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """One fresh process on the disk caches below `cache`."""
    command = [sys.executable, "-m", "bench.compile_time", "--child", engine, "--dtype", args.dtype]
    for name in ("target", "draft"):  # as folders: the child looks for models in its own cache, which is empty
        command += [f"--{name}", common.model_folder(getattr(args, name)) if getattr(args, name) else ""]
    for name in ("tokens", "new_tokens", "budget", "lookahead"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(
        command,
        cwd=common.ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "SPECPASS_CACHE": f"{cache}/specpass"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(engine, found, flush=True)
    return found


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    runs: dict[str, dict[str, Any]] = {}
    for engine in args.engines:
        with tempfile.TemporaryDirectory(prefix="specpass-bench-") as cache:
            runs[engine] = {"cold": measure(engine, args, cache)}
            if not args.no_warm:
                runs[engine]["warm"] = measure(engine, args, cache)
    if {"specpass", "stock"} <= runs.keys():
        ours, stock = (runs[engine]["cold"]["compile_s"] for engine in ("specpass", "stock"))
        runs["specpass"]["share_of_stock_cold"] = round(ours / stock, 3)
    settings = {k: getattr(args, k) for k in ("tokens", "new_tokens", "budget", "lookahead", "dtype")}
    settings |= {"target": Path(args.target).name, "draft": Path(args.draft).name}
    common.save_results(args.out, settings, runs=runs)


if __name__ == "__main__":
    main()
