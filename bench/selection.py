"""select: torch's stable sort against other ways to the same indices, on this machine; and what a GPU would move.

All take pooled scores [B, K, T] to the top C - W positions, ascending, ties to the lower position:

- sort: what select runs, one stable sort of all columns.
- topk: torch.topk, then ascending. No promise about ties, so its indices may differ where scores are equal.
- topk of keys: score bits and position in one int64, so that topk itself breaks ties rightly.
- threshold: the C - W th score by kthvalue, everything above it and the first of the equal ones.

`select_ms` is all of select (pooling, window, second sort); `importance_ms` what stands in front of it, and
`importance_given_lse_ms` the same where the attention pass returned the rows' log-sum-exp.
Times are one thread's CPU time, which other work on the machine hardly changes. Bytes, not times, speak for the GPU:
nothing was measured there.

`python -m bench.selection`
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
from specpass.kernels.importance.reference import importance
from specpass.ops import rows as rows_ops
from specpass.ops import select as select_ops

LENGTHS = (8_192, 32_768, 131_072)
BATCH, KV_HEADS, GROUP, DIM, BUDGET, WINDOW, ROWS, KERNEL = 1, 8, 4, 128, 1024, 32, 64, 7


def by_sort(pooled: Tensor, top: int) -> Tensor:
    """[B, K, top] ascending."""
    return torch.sort(pooled, dim=-1, descending=True, stable=True).indices[..., :top].sort(-1).values


def by_topk(pooled: Tensor, top: int) -> Tensor:
    """The same, whatever torch.topk makes of ties."""
    return torch.topk(pooled, top, sorted=False).indices.sort(-1).values


def by_keys(pooled: Tensor, top: int) -> Tensor:
    """Scores are not negative, so that their bits order as they do; the position is the rest of the key."""
    size = pooled.shape[-1]
    bits = pooled.contiguous().view(torch.int32).to(torch.int64) << 32
    keys = bits + (size - torch.arange(size, device=pooled.device))
    return (size - (torch.topk(keys, top, sorted=False).values & 0xFFFFFFFF)).sort(-1).values


def by_threshold(pooled: Tensor, top: int) -> Tensor:
    """The top-th largest score, then the first of those that equal it."""
    least = torch.kthvalue(pooled, pooled.shape[-1] - top + 1, dim=-1, keepdim=True).values
    above, equal = pooled > least, pooled == least
    kept = above | (equal & (equal.cumsum(-1) <= top - above.sum(-1, keepdim=True)))
    return kept.nonzero()[:, 2].view(*pooled.shape[:2], top)


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sort": by_sort,
    "topk": by_topk,
    "topk of keys": by_keys,
    "threshold": by_threshold,
}


def milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """One untimed call, then the times."""
    call()
    spans = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spans.append(1e3 * (time.process_time() - start))
    return spans


def bytes_of(columns: int) -> dict[str, Any]:
    """Bytes of one KV head's layer on a GPU with 16-bit K and V: what a select could save, and what stands beside it.

    A radix sort moves 4 bytes of score and 8 of index in and out, 8 bits a pass; no way reads less than the scores.
    """
    attention, scoring = 2 * DIM * 2 * columns, (2 * DIM + 4) * columns  # K and V once; K once, scores out
    sort, least = 4 * 2 * 12 * columns, 4 * columns
    return {
        "attention": attention,
        "importance": scoring,
        "sort": sort,
        "least": least,
        "could_save": round((sort - least) / (attention + scoring + sort), 3),
    }


def measure(columns: int, repeats: int) -> dict[str, Any]:
    """One prompt length: medians in milliseconds, and whether each way found what sort finds."""
    torch.manual_seed(0)
    lengths = torch.tensor([columns])
    rows = rows_ops.score_rows(lengths, None, ROWS, [])
    query, key = torch.randn(BATCH, KV_HEADS * GROUP, ROWS, DIM), torch.randn(BATCH, KV_HEADS, columns, DIM)
    args = (query, key, rows, lengths, WINDOW, DIM**-0.5, "max")
    lse = torch.cat(
        [
            (query[:, head * GROUP : (head + 1) * GROUP] @ key[:, [head]].mT * DIM**-0.5)
            .masked_fill_(torch.arange(columns) > rows[:, None, :, None], float("-inf"))
            .logsumexp(-1)
            for head in range(KV_HEADS)
        ],
        1,
    )
    scores = importance(*args)
    error = (importance(*args, lse=lse) - scores).abs().max()
    pooled = torch.nn.functional.max_pool1d(scores, KERNEL, 1, KERNEL // 2)  # plateaus: ties are the rule
    top = BUDGET - WINDOW
    expected = by_sort(pooled, top)
    found: dict[str, Any] = {
        name: {
            "ms": median(milliseconds(lambda way=way: way(pooled, top), repeats), 3),
            "same_as_sort": bool(torch.equal(way(pooled, top), expected)),
        }
        for name, way in WAYS.items()
    }
    select = median(milliseconds(lambda: select_ops.select(scores, lengths, BUDGET, WINDOW, KERNEL, "max"), repeats), 3)
    alone, given = (
        median(milliseconds(lambda known=known: importance(*args, lse=known), 3), 1) for known in (None, lse)
    )
    return {
        "columns": columns,
        "ways": found,
        "select_ms": select,
        "importance_ms": alone,
        "importance_given_lse_ms": given,
        "given_lse_error": float(error),
        "gpu_bytes_of_a_kv_head": bytes_of(columns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "select.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for columns in options.lengths:
        found.append(measure(columns, options.repeats))
        print(found[-1], flush=True)
    settings = {
        "batch": BATCH,
        "kv_heads": KV_HEADS,
        "group": GROUP,
        "dim": DIM,
        "budget": BUDGET,
        "window": WINDOW,
        "rows": ROWS,
        "repeats": options.repeats,
        "threads": 1,
        "dtype": "float32",
    }
    save_results(options.out, settings, note="GPU not measured: its column holds bytes, not times", results=found)


if __name__ == "__main__":
    main()
