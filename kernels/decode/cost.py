"""Closed forms of decode attention; symbols as in specpass/kernels/cost.py. Imported on first use: sympy is slow to
load."""

from __future__ import annotations

import sympy

from specpass.kernels.cost import NOTHING, B, Cost, D, Dp, G, K, P, V, Vp, e, n, p, s

SPLIT = sympy.Min(1, p - 1)  # 1 where a second launch combines splits, else 0

DECODE = Cost(
    bytes=B * K * (P + G) * (D + V) * e + SPLIT * 2 * B * K * p * G * (V + 1) * 4,
    reread=NOTHING,
    flops=2 * B * K * 16 * P * (Dp + Vp),
    shared=(s - 1) * n * (Dp + Vp) * e,
    accumulators=16 * (n + Vp),
    programs=B * K * p,
    launches=1 + SPLIT,
)

CODES = Cost(  # of 8 bits; 4 move half as much of the prompt
    bytes=B * K * (P + G * e) * (D + V) + SPLIT * 2 * B * K * p * G * (V + 1) * 4,
    reread=NOTHING,
    flops=2 * B * K * 16 * P * (Dp + Vp),
    shared=NOTHING,  # codes become numbers in registers
    accumulators=16 * (n + Vp),
    programs=B * K * p,
    launches=1 + SPLIT,
)
