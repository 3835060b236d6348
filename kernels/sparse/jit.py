"""Attention of a prompt that reads a part of it, as a Triton kernel: one launch, no mask or copy of K or V in memory.

Glossary
    B, K, G     batch, key/value heads, query heads of a KV head (H = K * G)
    T           columns of a prompt, its lookahead included; as `recent`, `window` and `ahead` a run-time number
    D, DV       head dimension of keys and of values
    V           columns that a KV head's queries read besides their last `recent` ones
    POSITIONS   positions of a program, whose G queries each are the rows of its tile: they share what they read
    BLOCK_M     rows of a tile, at least G: row m is member m % G at position m // G of the tile
    BLOCK_N     columns read at a time
    BLOCK_V     chosen columns looked at at a time where those in front of a tile are counted
    reach       the last position in front of what a row reads by itself: chosen columns count up to it, all columns
                behind it are read. Rows that read everything reach to -1
    UPCAST, PRECISION: as in importance/jit.py

Chosen columns are the KV head's, so K and V are read by index once for POSITIONS * G rows. They ascend: a tile reads
those in front of its last row's own ones, and stops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specpass.kernels.logits import LOG2E


@triton.jit
def attend_columns(
    q,
    key,
    value,
    column,
    inside,
    allowed,
    best,
    total,
    acc,
    key_t,
    value_t,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A running softmax (maximum, sum, sum of values) with columns [BLOCK_N] more of one KV head's K and V.

    inside [BLOCK_N]: which there are; allowed [BLOCK_M, BLOCK_N]: which a row reads. A row that read none has a maximum
    of -inf, and sums of 0.
    """
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # 64 bits: B * T * K * D passes 2^31 at batch 16 and 128k tokens.
    wide = column.to(tl.int64)
    k = tl.load(key + wide[None, :] * key_t + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
    v = tl.load(value + wide[:, None] * value_t + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)  # base 2
    logits = tl.where(allowed, logits, float("-inf"))
    new = tl.maximum(best, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf minus -inf is not a number
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(best - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def count_chosen(columns, bound, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many of one KV head's columns [V] (ascending, -1 unused and last) are at most `bound`."""
    found = tl.zeros([BLOCK_V], tl.int32)
    for start in tl.range(0, V, BLOCK_V):
        index = start + tl.arange(0, BLOCK_V)
        column = tl.load(columns + index, mask=index < V, other=-1)
        found += ((column >= 0) & (column <= bound)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["T", "window", "ahead", "recent"])
def attend_sparsely(
    query,
    key,
    value,
    columns,
    lengths,
    out,
    T,
    window,
    ahead,
    recent,
    query_b,
    query_h,
    query_t,
    key_b,
    key_k,
    key_t,
    value_b,
    value_k,
    value_t,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one KV head; grid (tiles of POSITIONS positions times B * K).

    query [B, H, T, D], key [B, K, T, D], value [B, K, T, DV] in whatever layout they have; columns [B, K, V] int64;
    lengths [B] int64. Writes out, which lies in memory as [B, T, H, DV]; zeros behind a row's lookahead.
    """
    tl.static_assert(BLOCK_M >= G, "a tile holds the whole group")
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_DV >= DV, "a tile holds whole values")
    POSITIONS: tl.constexpr = BLOCK_M // G
    # The last tiles of every head come first: those that read all columns are among them, and nothing waits for them.
    tiles = tl.cdiv(T, POSITIONS)
    heads = tl.num_programs(0) // tiles
    tile, head = tiles - 1 - tl.program_id(0) // heads, tl.program_id(0) % heads
    batch, own = (head // K).to(tl.int64), (head % K).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    whole = length - window  # the first position that reads all
    first = tile * POSITIONS
    last = tl.minimum(first + POSITIONS, tl.minimum(length + ahead, T)) - 1  # below `first`: nobody's

    m, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    position, member = first + m // G, own * G + m % G
    inside = (m < POSITIONS * G) & (position < T)
    rows = query + batch * query_b + member[:, None] * query_h + position.to(tl.int64)[:, None] * query_t
    q = tl.load(rows + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    row = tl.where(inside & (position <= last), position, -1)  # reads nothing at -1
    reach = tl.where((position >= whole) | (row < 0), -1, position - recent)

    key += batch * key_b + own * key_k
    value += batch * value_b + own * value_k
    columns += head.to(tl.int64) * V
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Chosen columns; of a prompt that is short enough to be read whole the first V, in the place of those.
    bound = tl.where(first >= whole, -1, last - recent)
    short = length + ahead <= V + recent
    used = tl.where(short, tl.minimum(V, bound + 1), count_chosen(columns, bound, V, BLOCK_V))
    for start in tl.range(0, used, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        chosen = tl.load(columns + index, mask=index < used, other=0).to(tl.int32)
        column = tl.where(index < used, tl.where(short, index, chosen), T)  # T: no row reaches so far
        allowed = column[None, :] <= reach[:, None]
        best, total, acc = attend_columns(
            q,
            key,
            value,
            column,
            index < used,
            allowed,
            best,
            total,
            acc,
            key_t,
            value_t,
            scale,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            UPCAST,
            PRECISION,
        )

    # Every column from the first row's own ones on; from 0 on where a row reads all.
    begin = tl.where(last >= whole, 0, tl.maximum(first - recent + 1, 0))
    end = tl.where(last >= first, last + 1, 0)
    for start in tl.range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        allowed = (column[None, :] > reach[:, None]) & (column[None, :] <= row[:, None])
        best, total, acc = attend_columns(
            q,
            key,
            value,
            column,
            column < end,
            allowed,
            best,
            total,
            acc,
            key_t,
            value_t,
            scale,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            UPCAST,
            PRECISION,
        )

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    # member counts a sequence's H = K * G heads
    places = out + ((batch * T + position.to(tl.int64)) * (K * G) + member)[:, None] * DV + dv[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])
