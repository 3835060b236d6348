"""reconstruction as Triton kernels: how far each column's absence would move what the query rows read.

Glossary: as in importance/jit.py, and
    DV, BLOCK_DV    head dimension of values, and rounded up to a power of two
    p, o            a row's softmax over the columns that it sees, and sum p v
    far             |v - o|², by squares: |v|² + |o|² - 2 v o
    LEAST           of 1 - p, by which p is divided: float32's rounding where p is all but 1

Two launches: `row_outputs` (log-sum-exp and o of each row, by a running softmax) and `column_moves` (the reduction
over rows; a program holds its columns' keys and values and walks over the M rows). p and o are float32 where keys and
values have 16 bits, and are multiplied as two numbers of 16 bits each: |v - o| is small where p is large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specpass.kernels.importance.jit import last_row, load_keys, tile_scores
from specpass.kernels.logits import add_sink

LEAST = tl.constexpr(1e-6)


@triton.jit
def dot_in_two(left, right, PRECISION: tl.constexpr):
    """left @ right in float32, of a `left` of any dtype and a float32 `right`: two numbers where left has 16 bits."""
    if left.dtype == tl.float32:
        product = tl.dot(left, right, input_precision=PRECISION)
    else:
        high = right.to(left.dtype)
        low = (right - high.to(tl.float32)).to(left.dtype)
        product = tl.dot(left, low, tl.dot(left, high))
    return product


@triton.jit(do_not_specialize=["T"])
def row_outputs(
    query,
    key,
    value,
    rows,
    sinks,
    lse,
    out,
    T,
    key_b,
    key_k,
    key_t,
    value_b,
    value_k,
    value_t,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """lse [B * K, M] (base 2) and out [B * K, M, DV], float32; grid (M in steps of BLOCK_M, B * K).

    sinks [H] float32, natural logits, read where SINKS. A row that is left out has an lse of inf, and 0.
    """
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_DV >= DV, "a tile holds whole values")
    tl.static_assert(BLOCK_R >= R, "a tile holds all positions")
    M: tl.constexpr = G * R
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_DV, BLOCK_M], tl.float32)
    tiles = (last_row(rows, head, K, R, BLOCK_R) + BLOCK_N) // BLOCK_N
    for tile in tl.range(0, tiles):
        keys = load_keys(key, tile, head, T, key_b, key_k, key_t, K, D, BLOCK_N, BLOCK_D)
        values = load_keys(value, tile, head, T, value_b, value_k, value_t, K, DV, BLOCK_N, BLOCK_DV)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tile_scores(
            keys,
            query,
            rows,
            tile,
            head,
            first,
            scale,
            K,
            G,
            R,
            D,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            SOFTCAP,
            UPCAST,
            PRECISION,
        )
        new = tl.maximum(best, tl.max(scores, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf minus -inf is not a number
        weights = tl.exp2(scores - base[None, :])
        shrink = tl.exp2(best - base)
        acc = acc * shrink[None, :] + dot_in_two(tl.trans(values), weights, PRECISION)
        total = total * shrink + tl.sum(weights, 0)
        best = new
    row, dv = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    seen = total > 0
    if SINKS:
        new, total = add_sink(best, total, sinks, head, row // R, row < M, K, G)
        acc = acc * tl.exp2(best - new)[None, :]
        best = new
    norm = tl.where(seen, best + tl.log2(tl.maximum(total, 1e-37)), float("inf"))
    tl.store(lse + head * M + row, norm, mask=row < M)
    result = acc / tl.where(seen, total, 1.0)[None, :]
    places = out + (head.to(tl.int64) * M + row)[None, :] * DV + dv[:, None]
    tl.store(places, result, mask=(row < M)[None, :] & (dv < DV)[:, None])


@triton.jit(do_not_specialize=["T"])
def column_moves(
    query,
    key,
    value,
    rows,
    lengths,
    lse,
    out,
    largest,
    scores,
    T,
    key_b,
    key_k,
    key_t,
    value_b,
    value_k,
    value_t,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scores [B, K, T] float32: p / (1 - p) |v - o| of each column, reduced over M rows; 0 from lengths - W on.

    lse, out: row_outputs'; largest [B * K] float32: the largest |v| of a head. Grid (tiles, B * K).
    """
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_DV >= DV, "a tile holds whole values")
    tl.static_assert(REDUCE == "max" or REDUCE == "mean" or REDUCE == "sum", "a reduction that is known")
    M: tl.constexpr = G * R
    tile, head = tl.program_id(0), tl.program_id(1)
    column, dv = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DV)
    found = scores + head.to(tl.int64) * T
    end = tl.load(lengths + head // K) - W
    if tile * BLOCK_N >= end:
        tl.store(found + column, tl.zeros([BLOCK_N], tl.float32), mask=column < T)
        return
    keys = load_keys(key, tile, head, T, key_b, key_k, key_t, K, D, BLOCK_N, BLOCK_D)
    values = load_keys(value, tile, head, T, value_b, value_k, value_t, K, DV, BLOCK_N, BLOCK_DV)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    wide = values.to(tl.float32)
    square = tl.sum(wide * wide, 1)  # [BLOCK_N]
    most = tl.sqrt(square) + tl.load(largest + head)
    reduced = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(0, M, BLOCK_M):
        part = tile_scores(
            keys,
            query,
            rows,
            tile,
            head,
            first,
            scale,
            K,
            G,
            R,
            D,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            SOFTCAP,
            UPCAST,
            PRECISION,
        )
        row = first + tl.arange(0, BLOCK_M)
        norm = tl.load(lse + head * M + row, mask=row < M, other=float("inf"))  # [BLOCK_M]
        p = tl.exp2(part - norm[None, :])
        places = out + (head.to(tl.int64) * M + row)[None, :] * DV + dv[:, None]
        o = tl.load(places, mask=(row < M)[None, :] & (dv < DV)[:, None], other=0.0)  # [BLOCK_DV, BLOCK_M]
        far = square[:, None] + tl.sum(o * o, 0)[None, :] - 2 * dot_in_two(values, o, PRECISION)
        moved = p / tl.maximum(1 - p, LEAST) * tl.sqrt(tl.maximum(far, 0.0))
        moved = tl.minimum(moved, p * most[:, None])
        if REDUCE == "max":
            reduced = tl.maximum(reduced, tl.max(moved, 1))
        else:
            reduced += tl.sum(moved, 1)
    if REDUCE == "mean":
        index = tl.arange(0, BLOCK_R)
        live = tl.load(rows + (head // K) * R + index, mask=index < R, other=-1) >= 0
        reduced = reduced / (G * tl.maximum(tl.sum(live.to(tl.int32), 0), 1))
    tl.store(found + column, tl.where(column < end, reduced, 0.0), mask=column < T)
