"""Attention of a prompt on this CPU: the library's own against torch's flash attention, for one layer, by turns.

Shapes are those of the Qwen2.5 pair, causal, bfloat16, one prompt; torch's runs once for each member of the GQA group,
on views, which is the fastest way to call it. Beside it the scores of the target's 64 rows, given their log-sum-exp, by
the library's own and in aten, and sparse attention (V = 2,048), whose columns such scores choose. The floor is the
FLOPs of both products (half of T^2 columns) over the rate of a large matrix product, the better of one before and one
after, which knows no softmax. `error` is the root mean square against float64 over that of torch's, at the shortest
length.

    python -m bench.prefill_attention
    python -m bench.prefill_attention --lengths 2048 --rounds 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, median, save_results
from specpass.benchmarks.speed.rates import matmul_rate
from specpass.kernels.cpu import importance, prefill
from specpass.kernels.importance import reference
from specpass.ops.attention import prefill_flash
from specpass.ops.select import select
from specpass.ops.sparse import prefill_attention_sparse

WINDOW, LOOKAHEAD, CHOSEN = 32, 32, 2_048
SHAPES = {"target": (12, 2, 128, LOOKAHEAD), "draft": (14, 2, 64, 0)}  # H, K, D, lookahead tokens behind the prompt
LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
ROUNDS = 7


def states(heads: int, kv_heads: int, dim: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as a layer makes them: [1, T, heads, D] in memory."""
    generator = torch.Generator().manual_seed(columns)
    query, key, value = (
        torch.randn(1, columns, count, dim, generator=generator).to(torch.bfloat16).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, after one that is not counted."""
    spans: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if turn:
                spans[name].append(1e3 * (time.perf_counter() - start))
    return spans


def scoring(given: tuple[Tensor, Tensor, Tensor], scale: float) -> dict[str, Callable[[], Any]]:
    """Calls that score a prompt, and that attend by the scores where it is long enough."""
    query, key, _ = given
    columns = query.shape[2]
    lengths = torch.tensor([columns - LOOKAHEAD])
    rows = torch.arange(columns - WINDOW - LOOKAHEAD, columns)[None]
    lse = prefill.prefill(*given, scale)[1][:, :, rows[0]].contiguous()
    operands = (query[:, :, rows[0]].contiguous(), key, rows, lengths, WINDOW, scale, "max", None, lse)
    chosen = select(reference.importance(*operands), lengths, CHOSEN, 0, 1, "max")
    ways: dict[str, Callable[[], Any]] = {
        "scores": lambda: importance.importance(*operands),
        "scores_aten": lambda: reference.importance(*operands),
    }
    if columns > 2 * CHOSEN:
        sizes = (scale, WINDOW, LOOKAHEAD, CHOSEN)
        ways["sparse"] = lambda: prefill_attention_sparse(*given, chosen, lengths, *sizes)
    return ways


def measure(model: str, length: int, rounds: int) -> dict[str, Any]:
    """One shape and length: medians in milliseconds."""
    heads, kv_heads, dim, lookahead = SHAPES[model]
    columns = length + lookahead
    given = states(heads, kv_heads, dim, columns)
    scale = dim**-0.5
    ways: dict[str, Callable[[], Any]] = {
        "flash": lambda: prefill_flash(*given, scale),
        "ours": lambda: prefill.prefill(*given, scale),
    }
    spans = by_turns(ways | (scoring(given, scale) if lookahead else {}), rounds)
    flops = 2 * heads * columns * (columns + 1) * dim
    medians = {name: median(times, 2) for name, times in spans.items()}
    return {
        "model": model,
        "columns": columns,
        "flops": flops,
        **{f"{name}_ms": value for name, value in medians.items()},
        "flash_least_ms": round(min(spans["flash"]), 2),
        "ours_least_ms": round(min(spans["ours"]), 2),
        "ratio": round(medians["ours"] / medians["flash"], 3),
        "flash_tflops": round(flops / medians["flash"] / 1e9, 3),
        "ours_tflops": round(flops / medians["ours"] / 1e9, 3),
    }


def error(model: str, length: int) -> float:
    """Root mean square of the difference to float64, over that of torch's flash attention."""
    heads, kv_heads, dim, _ = SHAPES[model]
    given = states(heads, kv_heads, dim, length)
    exact = prefill_flash(*(tensor.double() for tensor in given), dim**-0.5)
    found = prefill.prefill(*given, dim**-0.5)[0], prefill_flash(*given, dim**-0.5)
    ours, flash = (float((out.double() - exact).square().mean().sqrt()) for out in found)
    return round(ours / flash, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill_attention.json")
    options = parser.parse_args()
    refused = prefill.refuse(*states(2, 1, 64, 32), 1.0)
    if refused:
        raise SystemExit(f"nothing to measure, torch's attention runs here: {refused}.")
    errors = {model: error(model, min(options.lengths)) for model in SHAPES}
    rates = [matmul_rate("cpu", "bfloat16")]
    found = []
    for length in options.lengths:
        for model in SHAPES:
            found.append(measure(model, length, options.rounds))
            print(found[-1], flush=True)
    rates.append(matmul_rate("cpu", "bfloat16"))
    for entry in found:
        entry["floor_ms"] = round(1e3 * entry["flops"] / max(rates), 2)
    settings = {
        "shapes": {model: dict(zip("HKDL", shape, strict=True)) for model, shape in SHAPES.items()},
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16",
    }
    save_results(options.out, settings, matmul_flops_per_s=[round(rate) for rate in rates], error=errors, results=found)


if __name__ == "__main__":
    main()
