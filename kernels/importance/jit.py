"""importance as Triton kernels: query rows against all keys, reduced to one score a column, no score matrix in memory.

Glossary
    B, K, G     batch, key/value heads, query heads of a KV head (H = K * G)
    R, M        query rows that score, R = W + L; M = G * R rows share a KV head
    T, D        key columns (a run-time size: prompts differ), head dimension
    W           the last W prompt columns are kept anyway and get no score
    tile        BLOCK_N columns of one KV head; a program holds its keys and walks over the M rows, BLOCK_M at a time
    BLOCK_D     D rounded up to a power of two, as tensor cores and tl.arange want it; the rest is masked
    UPCAST      operands become float32 before each dot: for bfloat16 in Triton's interpreter, whose
                bfloat16 arithmetic is wrong
    REDUCE      over the M rows: "max", "mean" of the rows that are not left out, or "sum"
    SOFTCAP     logits are SOFTCAP * tanh(logits / SOFTCAP), as in Gemma 2; 0.0: no cap
    SINKS       each query head has a logit that belongs to no key and takes its share of the softmax, as in gpt-oss
    WEIGHTED    each of the R rows counts by its own weight (SpecPC's window rows do)
    PRECISION   of float32 dots: "tf32x3" is float32 in three tensor-core products, "ieee" has no tensor cores on CUDA

Three launches: `tile_lse` (a log-sum-exp for each row and tile), `combine_lse` (one for each row), `column_scores`
(the reduction over rows). Keys are the left operand, so that each warp keeps its own columns' keys in registers and
the reduction over rows stays inside a warp. With the log-sum-exp at hand (flash attention returns it) the third is
the only launch, and K is read once.

For "max" the exponential is monotone: score - lse is reduced, and exponentiated once a column. A weight is a factor of
the probability, so its logarithm goes off the row's log-sum-exp, and no reduction knows of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specpass.kernels.logits import LOG2E, add_sink, base2_logits


@triton.jit
def load_keys(
    key,
    tile,
    head,
    T,
    stride_b,
    stride_k,
    stride_t,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The keys of one tile [BLOCK_N, BLOCK_D] from [B, K, T, D] in whatever layout it has; zeros outside."""
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    # 64 bits from here on: B * T * K * D passes 2^31 at batch 16 and 128k tokens.
    base = key + (head // K).to(tl.int64) * stride_b + (head % K).to(tl.int64) * stride_k
    offsets = column.to(tl.int64)[:, None] * stride_t + d[None, :]  # [BLOCK_N, BLOCK_D]
    return tl.load(base + offsets, mask=(column < T)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def tile_scores(
    keys,
    query,
    rows,
    tile,
    head,
    first,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 scores of rows first .. first + BLOCK_M - 1 of M [BLOCK_N, BLOCK_M]; -inf where the row may not look.

    A row that is left out stands at position -1 and so sees no column.
    """
    M: tl.constexpr = G * R
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    base = query + head.to(tl.int64) * (M * D)
    q = tl.load(base + row[None, :] * D + d[:, None], mask=(row < M)[None, :] & (d < D)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)  # [BLOCK_D, BLOCK_M]
    position = tl.load(rows + (head // K) * R + row % R, mask=row < M, other=-1)  # [BLOCK_M]
    scores = base2_logits(tl.dot(keys, q, input_precision=PRECISION), scale, SOFTCAP)
    return tl.where(column[:, None] <= position[None, :], scores, float("-inf"))


@triton.jit
def last_row(rows, head, K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The largest position of a sequence's query rows: no column behind it is seen by any."""
    index = tl.arange(0, BLOCK_R)
    return tl.max(tl.load(rows + (head // K) * R + index, mask=index < R, other=-1), 0)


@triton.jit(do_not_specialize=["T"])
def tile_lse(
    query,
    key,
    rows,
    partial,
    T,
    stride_b,
    stride_k,
    stride_t,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial [B * K, tiles, M] float32: base-2 log-sum-exp of each row over one tile; grid (tiles, B * K)."""
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_R >= R, "a tile holds all positions")
    M: tl.constexpr = G * R
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile * BLOCK_N > last_row(rows, head, K, R, BLOCK_R):
        return  # combine_lse does not read this tile
    keys = load_keys(key, tile, head, T, stride_b, stride_k, stride_t, K, D, BLOCK_N, BLOCK_D)
    if UPCAST:
        keys = keys.to(tl.float32)
    out = partial + (head.to(tl.int64) * tl.num_programs(0) + tile) * M
    for first in tl.range(0, M, BLOCK_M):
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
        best = tl.max(scores, 0)  # [BLOCK_M]
        base = tl.where(best == float("-inf"), 0.0, best)  # -inf minus -inf is not a number
        total = tl.sum(tl.exp2(scores - base[None, :]), 0)
        lse = tl.where(total > 0, base + tl.log2(tl.maximum(total, 1e-37)), float("-inf"))
        row = first + tl.arange(0, BLOCK_M)
        tl.store(out + row, lse, mask=row < M)


@triton.jit(do_not_specialize=["tiles"])
def combine_lse(
    partial,
    rows,
    sinks,
    lse,
    tiles,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SINKS: tl.constexpr,
):
    """lse [B * K, M] float32, natural: of each row over all tiles; grid (M in steps of BLOCK_S, B * K).

    sinks [H] float32, natural logits, read where SINKS.
    BLOCK_T tiles of BLOCK_S rows are read at a time; BLOCK_N is tile_lse's.
    """
    tl.static_assert(BLOCK_R >= R, "a tile holds all positions")
    M: tl.constexpr = G * R
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    used = tl.minimum(tiles, (last_row(rows, head, K, R, BLOCK_R) + BLOCK_N) // BLOCK_N)
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(0, used, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        offsets = (head.to(tl.int64) * tiles + tile)[:, None] * M + row[None, :]
        part = tl.load(partial + offsets, mask=(tile < used)[:, None] & (row < M)[None, :], other=float("-inf"))
        new = tl.maximum(best, tl.max(part, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(best - base) + tl.sum(tl.exp2(part - base[None, :]), 0)
        best = new
    if SINKS:
        best, total = add_sink(best, total, sinks, head, row // R, row < M, K, G)
    out = tl.where(total > 0, (best + tl.log2(tl.maximum(total, 1e-37))) / LOG2E, float("-inf"))
    tl.store(lse + head * M + row, out, mask=row < M)


@triton.jit(do_not_specialize=["T"])
def column_scores(
    query,
    key,
    rows,
    lengths,
    lse,
    weights,
    scores,
    T,
    stride_b,
    stride_k,
    stride_t,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    REDUCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scores [B, K, T] float32: probabilities of each column, reduced over M rows; 0 from lengths - W on.

    lse [B * K, M] float32, natural; weights [R] float32, >= 0, read where WEIGHTED. Grid (tiles, B * K).
    """
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_R >= R, "a tile holds all positions")
    tl.static_assert(REDUCE == "max" or REDUCE == "mean" or REDUCE == "sum", "a reduction that is known")
    M: tl.constexpr = G * R
    tile, head = tl.program_id(0), tl.program_id(1)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = scores + head.to(tl.int64) * T
    end = tl.load(lengths + head // K) - W
    if tile * BLOCK_N >= end:
        tl.store(out + column, tl.zeros([BLOCK_N], tl.float32), mask=column < T)
        return
    keys = load_keys(key, tile, head, T, stride_b, stride_k, stride_t, K, D, BLOCK_N, BLOCK_D)
    if UPCAST:
        keys = keys.to(tl.float32)
    reduced = tl.full([BLOCK_N], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
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
        norm = tl.load(lse + head * M + row, mask=row < M, other=0.0) * LOG2E  # [BLOCK_M]
        if WEIGHTED:
            norm -= tl.log2(tl.load(weights + row % R, mask=row < M, other=1.0))  # weight 0: infinity, a share of 0
        part -= tl.where(norm == float("-inf"), 0.0, norm)[None, :]  # a row that is left out stays at -inf
        if REDUCE == "max":
            reduced = tl.maximum(reduced, tl.max(part, 1))
        else:
            reduced += tl.sum(tl.exp2(part), 1)
    if REDUCE == "max":
        reduced = tl.exp2(reduced)
    if REDUCE == "mean":
        index = tl.arange(0, BLOCK_R)
        live = tl.load(rows + (head // K) * R + index, mask=index < R, other=-1) >= 0
        reduced = reduced / (G * tl.maximum(tl.sum(live.to(tl.int32), 0), 1))
    tl.store(out + column, tl.where(column < end, reduced, 0.0), mask=column < T)
