"""Closed forms of importance; symbols as in specpass/kernels/cost.py. Imported on first use: sympy is slow to load."""

from __future__ import annotations

import sympy

from specpass.kernels.cost import B, Cost, D, Dp, K, M, T, e, m, n, s

_SHARED = n * Dp * e + (s - 2) * m * Dp * e
_REREAD = B * K * T / n * M * D * e
_FLOPS = 2 * B * K * M * T * Dp
_PROGRAMS = B * K * sympy.ceiling(T / n)
_OUTER = B * K * M * (D * e + 8) + B * K * T * 4

IMPORTANCE = Cost(
    bytes=2 * B * K * T * D * e + _OUTER + 2 * B * K * T / n * M * 4,
    reread=2 * _REREAD,
    flops=2 * _FLOPS,
    shared=_SHARED,
    accumulators=n * m,
    programs=_PROGRAMS,
    launches=sympy.Integer(3),
)
GIVEN_LSE = Cost(
    bytes=B * K * T * D * e + _OUTER,
    reread=_REREAD,
    flops=_FLOPS,
    shared=_SHARED,
    accumulators=n * m,
    programs=_PROGRAMS,
    launches=sympy.Integer(1),
)
