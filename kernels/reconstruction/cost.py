"""Closed forms of reconstruction; symbols as in kernels/cost.py. Imported on first use: sympy is slow to load."""

from __future__ import annotations

import sympy

from specpass.kernels.cost import B, Cost, D, Dp, K, M, T, V, Vp, e, m, n, s

RECONSTRUCTION = Cost(
    bytes=2 * B * K * T * (D + V) * e + B * K * (T * 4 + M * (D * e + 2 * V * 4 + 16)),
    reread=B * K * (M / m * T * (D + V) * e + T / n * M * (D * e + V * 4)),
    flops=4 * B * K * M * T * (Dp + 2 * Vp),
    shared=(s - 1) * n * (Dp + Vp) * e,
    accumulators=m * (n + Vp) + n * m,
    programs=B * K * sympy.ceiling(M / m),
    launches=sympy.Integer(2),
)
