"""Products of a prompt in bfloat16 on a CPU that has no instructions for it: by torch, and in float32 (cpu/wide.py).

Linear layers of the Qwen2.5 pair's target, by turns: as torch multiplies bfloat16, as graphs of specpass do, and torch
in float32, whose weights take twice the memory. The floor is the FLOPs over the rate of a large product in float32.
With `--models`, whole first tokens as well: transformers in both dtypes, and SpecKV in bfloat16.

    python -m bench.wide_products
    python -m bench.wide_products --rows 512 --rounds 3 --models
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import specpass
from bench.common import RESULTS, load_model, load_tokenizer, median, own_text, save_results
from bench.prefill_attention import by_turns
from specpass.benchmarks.speed.rates import matmul_rate
from specpass.kernels.cpu import wide
from specpass.kernels.cpu.isa import multiplies

LINEARS = ((1536, 1536), (8960, 1536), (1536, 8960))  # N, K
PAIR = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")


def measure(name: str, flops: int, rate: float, rounds: int, ways: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Medians in milliseconds beside the floor."""
    medians = {f"{way}_ms": median(spans, 2) for way, spans in by_turns(ways, rounds).items()}
    entry = {"product": name, "flops": flops, **medians, "floor_ms": round(1e3 * flops / rate, 2)}
    entry["ratio"] = round(medians["ours_ms"] / medians["torch_ms"], 3)
    print(entry, flush=True)
    return entry


def linear(features: int, inner: int, rows: int) -> tuple[str, int, dict[str, Callable[[], Any]]]:
    x, weight = (torch.randn(count, inner).bfloat16() for count in (rows, features))
    x32, weight32 = x.float(), weight.float()
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: F.linear(x, weight),
        "ours": lambda: wide.linear(x, weight, None),
        "float32": lambda: F.linear(x32, weight32),
    }
    return f"linear {rows} x {inner} x {features}", 2 * rows * inner * features, ways


def first_tokens(length: int, rounds: int) -> dict[str, Any]:
    """Seconds to a prompt's first token: one way at a time, since all weights together take 13 GB."""
    prompts = own_text(load_tokenizer(PAIR[0]), rounds + 1, length)
    found: dict[str, Any] = {"tokens": length}
    for name in ("transformers, float32", "transformers", "SpecKV"):
        target = load_model(PAIR[0], "float32" if "float32" in name else "bfloat16")
        if name == "SpecKV":
            specpass.compile(target, draft=load_model(PAIR[1]), method=specpass.SpecKV(256))
        spans = []
        for ids in prompts:  # the first one compiles
            since = time.perf_counter()
            target.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
            spans.append(time.perf_counter() - since)
        found[f"{name}_s"] = median(spans[1:], 2)
        print(found, flush=True)
        del target
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(128, 1024, 4096))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", action="store_true", help="first tokens too, of 1,024 tokens, one round")
    parser.add_argument("--out", type=Path, default=RESULTS / "wide_products.json")
    options = parser.parse_args()
    if multiplies(torch.bfloat16):
        raise SystemExit("nothing to measure: this CPU has instructions for bfloat16.")
    rate = matmul_rate("cpu", "float32")
    cases = [linear(*sizes, rows) for rows in options.rows for sizes in LINEARS]
    found = [measure(name, flops, rate, options.rounds, ways) for name, flops, ways in cases]
    parts = {"first_tokens": first_tokens(1024, 1)} if options.models else {}
    settings = {"rounds": options.rounds, "threads": torch.get_num_threads()}
    save_results(options.out, settings, matmul_flops_per_s=round(rate), results=found, **parts)


if __name__ == "__main__":
    main()
