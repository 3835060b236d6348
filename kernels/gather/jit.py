"""gather as a Triton kernel: the kept K and V become the cache's storage in one launch.

Glossary
    B, K, T     batch, key/value heads, prompt columns (a run-time size)
    D, DV       head dimension of keys and of values
    C, N, P     budget, room for generated tokens, slots P = C + N of each KV head
    BLOCK_P     slots of one program; BLOCK_C: positions read at a time when slots in use are counted
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    states,
    storage,
    source,
    slot,
    head,
    stride_b,
    stride_k,
    stride_t,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows `source` of one KV head's states [T, D] into rows `slot` of its storage [P, D]; -1 writes zeros."""
    d = tl.arange(0, BLOCK_D)
    base = states + (head // K).to(tl.int64) * stride_b + (head % K).to(tl.int64) * stride_k
    offsets = source.to(tl.int64)[:, None] * stride_t + d[None, :]  # [BLOCK_P, BLOCK_D]
    kept = tl.load(base + offsets, mask=(source >= 0)[:, None] & (d < D)[None, :], other=0.0)
    out = storage + head.to(tl.int64) * (P * D) + slot[:, None] * D + d[None, :]
    tl.store(out, kept, mask=(slot < P)[:, None] & (d < D)[None, :])


@triton.jit
def gather_slots(
    key,
    value,
    positions,
    keys,
    values,
    lengths,
    key_b,
    key_k,
    key_t,
    value_b,
    value_k,
    value_t,
    K: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """keys [B, K * P, D], values [B, K * P, DV], lengths [B, K] int64 from positions [B, K, C] (-1: unused).

    Grid (P in steps of BLOCK_P, B * K); a head's first program counts its slots in use.
    """
    tl.static_assert(BLOCK_D >= D, "a tile holds whole keys")
    tl.static_assert(BLOCK_DV >= DV, "a tile holds whole values")
    P: tl.constexpr = C + N
    head = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    source = tl.load(positions + head.to(tl.int64) * C + slot, mask=slot < C, other=-1)  # [BLOCK_P]
    copy_rows(key, keys, source, slot, head, key_b, key_k, key_t, K, P, D, BLOCK_D)
    copy_rows(value, values, source, slot, head, value_b, value_k, value_t, K, P, DV, BLOCK_DV)
    if tl.program_id(0) == 0:
        used = tl.zeros([BLOCK_C], tl.int64)
        for start in tl.range(0, C, BLOCK_C):
            index = start + tl.arange(0, BLOCK_C)
            kept = tl.load(positions + head.to(tl.int64) * C + index, mask=index < C, other=-1) >= 0
            used += kept.to(tl.int64)
        tl.store(lengths + head, tl.sum(used, 0))
