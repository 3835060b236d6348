"""What a decode step on this CPU consists of, ours beside torch's, by turns: matrix products and attention.

Products: weights of the Qwen2.5 pair's shapes, as many as take 1.2 GB, one after another, as a step reads them; `read`
is the sum of the same bytes as int64, `packed` is oneDNN's way with a copy of each weight in its own layout, where it
multiplies the dtype. Attention: one new token behind the slots in use, one layer, aten's append and attention against
one call, with equal budgets and with those that KV heads share.

    python -m bench.step_kernels
    python -m bench.step_kernels --rows 1 4 --rounds 3
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import RESULTS, median, save_results
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.isa import multiplies
from specpass.kernels.cpu.linear import few_rows, multiply
from specpass.kernels.decode import reference
from specpass.kernels.shapes import dtype_of
from specpass.ops import attention as ops

SHAPES = {
    "target": ((8960, 1536), (1536, 8960), (1536, 1536), (256, 1536), (151_936, 1536)),
    "draft": ((4864, 896), (896, 4864), (896, 896), (128, 896)),
}
HEADS = {"target": (12, 2, 128), "draft": (14, 2, 64)}  # H, K, D
SLOTS, BATCHES = (256, 1_024, 8_192), (1, 4)
BYTES = 1_200_000_000


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, after one call that is not counted."""
    spans: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if turn:
                spans[name].append(1e3 * (time.perf_counter() - start))
    return spans


def products(shape: tuple[int, int], rows: int, rounds: int, pool: Tensor) -> dict[str, Any]:
    """Gigabytes of weights a second, by each way: median and best."""
    size = shape[0] * shape[1]
    count = pool.numel() // size
    weights = [pool[index * size : (index + 1) * size].view(shape) for index in range(count)]
    x = torch.randn(rows, shape[1]).to(pool.dtype)
    own = few_rows(pool.dtype)
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: pool[: count * size].view(torch.int64).sum(),
        "linear": lambda: [F.linear(x, weight) for weight in weights],
    }
    if multiplies(pool.dtype):
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
        ways["packed"] = lambda: [torch.ops.mkldnn._linear_pointwise(x, each, None, "none", [], "") for each in packed]
    if not isinstance(own, Unbuilt):
        ways["ours"] = lambda: [multiply(own, x, [weight], [None]) for weight in weights]
    gigabytes = pool.itemsize * count * size / 1e9
    spans = by_turns(ways, rounds)
    rates = {f"{name}_gb_s": round(1e3 * gigabytes / median(times), 2) for name, times in spans.items()}
    best = {f"{name}_best_gb_s": round(1e3 * gigabytes / min(times), 2) for name, times in spans.items()}
    return {"weight": list(shape), "weights": count, "rows": rows, "dtype": dtype_of(pool), **rates, **best}


def attention(model: str, batch: int, slots: int, dtype: str, shared: bool, rounds: int) -> dict[str, Any]:
    """Milliseconds of a layer's append and attention, by each way.

    Args: shared: whether KV heads share budgets: one has half of another's slots, in one storage.
    """
    heads, kv_heads, dim = HEADS[model]
    kind, room = getattr(torch, dtype), slots + 64
    keys, values = (torch.randn(batch, kv_heads * room, dim).to(kind) for _ in range(2))
    new = [torch.randn(batch, count, 1, dim).to(kind) for count in (heads, kv_heads, kv_heads)]
    used, offsets = torch.full((batch, kv_heads), slots), None
    if shared:
        used[:, 0] -= slots // 3
        used[:, 1] += slots // 3
        offsets = (used + 64).cumsum(1) - (used + 64)
    lengths = torch.empty_like(used)

    def repeated(call: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(20):
                call(keys, values, lengths.copy_(used), *new, dim**-0.5, 0.0, None, 0, 0, offsets)

        return run

    spans = by_turns({"aten": repeated(reference.append_attend), "ours": repeated(ops.append_attend)}, rounds)
    medians = {f"{name}_ms": median([each / 20 for each in times]) for name, times in spans.items()}
    return {"model": model, "batch": batch, "slots": slots, "dtype": dtype, "shared": shared, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 5, 8, 16, 32], help="none: attention alone")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_kernels.json")
    args = parser.parse_args()
    linears, attentions = [], []
    for kind in (getattr(torch, name) for name in args.dtypes if args.rows):
        pool = torch.empty(BYTES // kind.itemsize, dtype=kind).normal_(std=0.02)
        for model, shapes in SHAPES.items():
            for shape, rows in itertools.product(shapes, args.rows):
                linears.append({"model": model, **products(shape, rows, args.rounds, pool)})
                print(linears[-1])
    for model in SHAPES:
        for batch, slots, dtype, shared in itertools.product(BATCHES, SLOTS, args.dtypes, (False, True)):
            attentions.append(attention(model, batch, slots, dtype, shared, args.rounds))
            print(attentions[-1])
    settings = {
        "rows": args.rows,
        "dtypes": args.dtypes,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "bytes": BYTES,
    }
    save_results(args.out, settings, products=linears, attention=attentions)


if __name__ == "__main__":
    main()
