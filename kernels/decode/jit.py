"""Budgeted decode attention as Triton kernels: one new query per sequence against the slots in use.

Glossary
    B, K, G     batch, key/value heads, query heads of a KV head (1 .. 16; H = K * G)
    D, DV       head dimension of keys and of values
    stride      slots of each KV head, P = C + N; how many are in use is read from the device
    splits      programs that share a KV head's slots, `steps` of BLOCK_N slots each; few heads would leave most of a
                GPU idle. As stride, run-time numbers: a draft that keeps its whole prompt has others for each, and
                must not compile anew for it
    RAGGED      KV heads have budgets of their own: head k of row b starts at slot offsets[b, k] of the row's `stride`,
                and what its splits share are its own slots in use
    SPLIT_UP    whether there are several splits, which `combine_splits` then makes one result of
    BLOCK_G     rows of a tile of queries: G rounded up to 16, the least that tensor cores take
    BLOCK_N     slots read at a time
    LSE         the log-sum-exp of the softmax is returned besides: scores of the same token need it
    WRITE       the new token's K/V goes into its slot in the same launch, and `lengths` is advanced by one
    SOFTCAP, SINKS, UPCAST, PRECISION: as in importance/jit.py
    A prompt in BITS 8 or 4 lies in `blocks` of GROUP slots and BLOCK_BYTES bytes (specpass/bits.py); KEY_CODES and the
    like say where the arrays of a block begin: codes in bytes, the rest in numbers of the model's dtype, of which
    BLOCK_NUMBERS are as long as a block. A byte of a row of codes holds plane 0 and, with 4 bits, plane 1: dimensions
    0 .. W - 1 and W .. 2 W - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specpass.kernels.logits import add_sink, base2_logits


@triton.jit(do_not_specialize=["stride", "steps"])
def attend_slots(
    query,
    keys,
    values,
    lengths,
    offsets,
    key,
    value,
    sinks,
    out,
    partial,
    lse,
    stride,
    steps,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT_UP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WRITE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one KV head; grid (B * K, splits), where splits * steps * BLOCK_N is at least the slots.

    query [B, H, D]; keys [B, K, stride, D], values [B, K, stride, DV], or [B, stride, ..] where RAGGED; lengths [B, K]
    int64, and offsets, read where RAGGED; key [B, K, D] and value [B, K, DV]: the new token's, read where WRITE, and
    then lengths does not count it yet; sinks [H] float32, natural logits, read where SINKS.
    Writes out [B, H, DV]; where SPLIT_UP partial [B * K, splits, G, DV] and lse [B * K, splits, G] float32.
    """
    tl.static_assert(BLOCK_G >= G, "a tile holds the whole group")
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_DV >= DV, "a tile holds whole values")
    head, split = tl.program_id(0), tl.program_id(1)
    g, d, dv = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(query + (head * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)  # [BLOCK_G, BLOCK_D]
    used = tl.load(lengths + head).to(tl.int32)
    size = steps * BLOCK_N  # slots of a split: whole steps, so that no slot is read by two
    slots = head.to(tl.int64) * stride
    if RAGGED:
        size = tl.cdiv(used + WRITE, tl.num_programs(1) * BLOCK_N) * BLOCK_N
        slots = (head // K).to(tl.int64) * stride + tl.load(offsets + head)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    if WRITE and split == used // size:  # the new token's slot is this split's; it is attended from registers
        new_k = tl.load(key + head * D + d, mask=d < D, other=0.0)
        new_v = tl.load(value + head * DV + dv, mask=dv < DV, other=0.0)
        tl.store(keys + (slots + used) * D + d, new_k, mask=d < D)
        tl.store(values + (slots + used) * DV + dv, new_v, mask=dv < DV)
        best = base2_logits(tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1), scale, SOFTCAP)
        total += 1.0
        acc += new_v.to(tl.float32)[None, :]
    if SINKS and split == 0:  # a logit of the softmax that has no value
        new, total = add_sink(best, total, sinks, head, g, g < G, K, G)
        acc = acc * tl.exp2(best - new)[:, None]
        best = new
    end = tl.minimum(split * size + size, used)
    for start in tl.range(split * size, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        k = tl.load(keys + (slots + n)[None, :] * D + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(
            values + (slots + n)[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_DV]
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = base2_logits(tl.dot(q, k, input_precision=PRECISION), scale, SOFTCAP)  # [BLOCK_G, BLOCK_N]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))  # finite: a tile is entered for its first slot at least
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        best = new
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT_UP:
        where = (head * tl.num_programs(1) + split) * G + g
        tl.store(lse + where, tl.where(total > 0, best + tl.log2(tl.maximum(total, 1e-37)), float("-inf")), mask=g < G)
        tl.store(partial + where[:, None] * DV + dv[None, :], result, mask=(g < G)[:, None] & (dv < DV)[None, :])
    else:
        rows = out + (head * G + g)[:, None] * DV + dv[None, :]
        tl.store(rows, result.to(out.dtype.element_ty), mask=(g < G)[:, None] & (dv < DV)[None, :])
        if WRITE:
            tl.store(lengths + head, (used + 1).to(tl.int64))


@triton.jit
def softmax_step(best, total, scores):
    """A running softmax one tile of scores [BLOCK_G, BLOCK_N] on.

    Returns its maximum, its sum, the tile's weights, and what sums so far shrink by.
    """
    new = tl.maximum(best, tl.max(scores, 1))  # finite: a tile is entered for its first slot at least
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(best - new)
    return new, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def numbers_of(codes, shift, scale, zero, BITS: tl.constexpr):
    """A plane of a tile of codes, as float32 numbers."""
    plane = (codes.to(tl.int32) >> shift) & (2**BITS - 1)
    return zero + scale * plane.to(tl.float32)


@triton.jit(do_not_specialize=["stride", "blocks", "steps"])
def attend_codes(
    query,
    codes,
    numbers,
    counts,
    keys,
    values,
    lengths,
    sinks,
    out,
    partial,
    lse,
    stride,
    blocks,
    steps,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_NUMBERS: tl.constexpr,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    SPLIT_UP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one KV head; grid (B * K, splits). A split has `steps` tiles of BLOCK_N slots of all that there are:
    the prompt's blocks first, then what stands behind it.

    query [B, H, D]; codes [B, K, blocks, BLOCK_BYTES] uint8, and the same memory as numbers; counts [B, K] slots of the
    prompt; keys [B, K, stride, D], values [B, K, stride, DV] and lengths [B, K] of what stands behind it; sinks [H].
    Writes as attend_slots does.
    """
    tl.static_assert(BLOCK_G >= G, "a tile holds the whole group")
    tl.static_assert(GROUP % BLOCK_N == 0, "a tile lies in one block")
    W: tl.constexpr = D * BITS // 8
    WV: tl.constexpr = DV * BITS // 8
    tl.static_assert(BLOCK_W >= W, "a tile holds whole rows of codes")
    tl.static_assert(BLOCK_WV >= WV, "a tile holds whole rows of codes")
    head, split = tl.program_id(0), tl.program_id(1)
    g, w, wv = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_WV)
    rows, key_in, value_in = (g < G)[:, None], w < W, wv < WV
    asked = query + (head * G + g)[:, None] * D + w[None, :]
    q = tl.load(asked, mask=rows & key_in[None, :], other=0.0)
    q_high = q
    if BITS == 4:
        q_high = tl.load(asked + W, mask=rows & key_in[None, :], other=0.0)
    if UPCAST:
        q, q_high = q.to(tl.float32), q_high.to(tl.float32)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_WV], tl.float32)
    acc_high = tl.zeros([BLOCK_G, BLOCK_WV], tl.float32)
    if SINKS and split == 0:  # a logit of the softmax that has no value
        best, total = add_sink(best, total, sinks, head, g, g < G, K, G)
    first = split * steps
    tiles = blocks * (GROUP // BLOCK_N)  # of the prompt
    count = tl.load(counts + head).to(tl.int32)
    for tile in tl.range(first, tl.minimum(first + steps, tl.cdiv(count, BLOCK_N))):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, slot = n < count, n % GROUP
        block = head.to(tl.int64) * blocks + (tile * BLOCK_N) // GROUP
        own, floats = codes + block * BLOCK_BYTES, numbers + block * BLOCK_NUMBERS
        packed = tl.load(own + KEY_CODES + slot[None, :] * W + w[:, None], mask=key_in[:, None], other=0)
        steps_k = tl.load(floats + KEY_SCALE + w, mask=key_in, other=0.0).to(tl.float32)[:, None]
        zeros_k = tl.load(floats + KEY_ZERO + w, mask=key_in, other=0.0).to(tl.float32)[:, None]
        products = tl.dot(q, numbers_of(packed, 0, steps_k, zeros_k, BITS).to(q.dtype), input_precision=PRECISION)
        if BITS == 4:
            steps_k = tl.load(floats + KEY_SCALE + W + w, mask=key_in, other=0.0).to(tl.float32)[:, None]
            zeros_k = tl.load(floats + KEY_ZERO + W + w, mask=key_in, other=0.0).to(tl.float32)[:, None]
            high = numbers_of(packed, 4, steps_k, zeros_k, BITS).to(q.dtype)
            products = tl.dot(q_high, high, products, input_precision=PRECISION)
        scores = tl.where(inside[None, :], base2_logits(products, scale, SOFTCAP), float("-inf"))
        best, total, weights, shrink = softmax_step(best, total, scores)
        weights = weights.to(q.dtype)
        packed = tl.load(own + VALUE_CODES + slot[:, None] * WV + wv[None, :], mask=value_in[None, :], other=0)
        group = slot[:, None] * (DV // VALUE_GROUP) + wv[None, :] // VALUE_GROUP
        steps_v = tl.load(floats + VALUE_SCALE + group, mask=value_in[None, :], other=0.0).to(tl.float32)
        zeros_v = tl.load(floats + VALUE_ZERO + group, mask=value_in[None, :], other=0.0).to(tl.float32)
        v = numbers_of(packed, 0, steps_v, zeros_v, BITS).to(q.dtype)  # [BLOCK_N, BLOCK_WV]
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
        if BITS == 4:
            group = slot[:, None] * (DV // VALUE_GROUP) + (WV + wv)[None, :] // VALUE_GROUP
            steps_v = tl.load(floats + VALUE_SCALE + group, mask=value_in[None, :], other=0.0).to(tl.float32)
            zeros_v = tl.load(floats + VALUE_ZERO + group, mask=value_in[None, :], other=0.0).to(tl.float32)
            v = numbers_of(packed, 4, steps_v, zeros_v, BITS).to(q.dtype)
            acc_high = tl.dot(weights, v, acc_high * shrink[:, None], input_precision=PRECISION)
    used = tl.load(lengths + head).to(tl.int32)
    behind = head.to(tl.int64) * stride
    last = tl.minimum(first + steps - tiles, tl.cdiv(used, BLOCK_N))
    for tile in tl.range(tl.maximum(first - tiles, 0), last):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < used
        k_rows = keys + (behind + n)[None, :] * D + w[:, None]
        v_rows = values + (behind + n)[:, None] * DV + wv[None, :]
        k_mask, v_mask = inside[None, :] & key_in[:, None], inside[:, None] & value_in[None, :]
        products = tl.dot(q, tl.load(k_rows, mask=k_mask, other=0.0).to(q.dtype), input_precision=PRECISION)
        if BITS == 4:
            k = tl.load(k_rows + W, mask=k_mask, other=0.0).to(q.dtype)
            products = tl.dot(q_high, k, products, input_precision=PRECISION)
        scores = tl.where(inside[None, :], base2_logits(products, scale, SOFTCAP), float("-inf"))
        best, total, weights, shrink = softmax_step(best, total, scores)
        weights = weights.to(q.dtype)
        v = tl.load(v_rows, mask=v_mask, other=0.0).to(q.dtype)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
        if BITS == 4:
            v = tl.load(v_rows + WV, mask=v_mask, other=0.0).to(q.dtype)
            acc_high = tl.dot(weights, v, acc_high * shrink[:, None], input_precision=PRECISION)
    share = 1 / tl.where(total > 0, total, 1.0)[:, None]
    mask = rows & value_in[None, :]
    if SPLIT_UP:
        where = (head * tl.num_programs(1) + split) * G + g
        tl.store(lse + where, tl.where(total > 0, best + tl.log2(tl.maximum(total, 1e-37)), float("-inf")), mask=g < G)
        place = partial + where[:, None] * DV + wv[None, :]
        tl.store(place, acc * share, mask=mask)
        if BITS == 4:
            tl.store(place + WV, acc_high * share, mask=mask)
    else:
        place = out + (head * G + g)[:, None] * DV + wv[None, :]
        tl.store(place, (acc * share).to(out.dtype.element_ty), mask=mask)
        if BITS == 4:
            tl.store(place + WV, (acc_high * share).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    partial,
    lse,
    lengths,
    out,
    natural,
    splits,
    G: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WRITE: tl.constexpr,
    LSE: tl.constexpr,
):
    """out [B, H, DV]: the splits' results, each weighted by its share of the softmax; grid (B * K, G).

    natural [B, H] float32: where LSE, the log-sum-exp of the whole softmax, in natural logits as everywhere outside.
    BLOCK_S is at least `splits`: one tile holds them all.
    `lengths` advances here where WRITE: in the first launch another split might still have read it.
    """
    head, g = tl.program_id(0), tl.program_id(1)
    split, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    where = (head * splits + split) * G + g
    part = tl.load(lse + where, mask=split < splits, other=float("-inf"))  # [BLOCK_S], base 2
    best = tl.max(part, 0)
    weights = tl.exp2(part - tl.where(best == float("-inf"), 0.0, best))
    rows = tl.load(
        partial + where[:, None] * DV + dv[None, :], mask=(split < splits)[:, None] & (dv < DV)[None, :], other=0.0
    )  # [BLOCK_S, BLOCK_DV]
    total = tl.sum(weights, 0)
    result = tl.sum(rows * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + (head * G + g) * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
    if LSE:
        tl.store(natural + head * G + g, (best + tl.log2(tl.maximum(total, 1e-37))) * 0.6931471805599453)
    if WRITE and g == 0:
        tl.store(lengths + head, tl.load(lengths + head) + 1)
