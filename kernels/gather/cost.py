"""Closed forms of gather; symbols as in specpass/kernels/cost.py. Imported on first use: sympy is slow to load."""

from __future__ import annotations

import sympy

from specpass.kernels.cost import NOTHING, B, C, Cost, D, Dp, K, P, V, Vp, e, n

GATHER = Cost(
    bytes=B * K * ((C + P) * (D + V) * e + C * 8),
    reread=NOTHING,
    flops=NOTHING,
    shared=NOTHING,
    accumulators=n * (Dp + Vp) * e / 4,
    programs=B * K * sympy.ceiling(P / n),
    launches=sympy.Integer(1),
)
