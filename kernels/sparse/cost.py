"""Closed forms of sparse prefill attention; symbols as in specpass/kernels/cost.py, C chosen columns and as many last
positions. Imported on first use: sympy is slow to load."""

from __future__ import annotations

import sympy

from specpass.kernels.cost import NOTHING, B, C, Cost, D, Dp, G, K, R, T, V, Vp, e, m, n, s

_c = sympy.Min(C, T)
_LAST = _c * T - _c * (_c - 1) / 2
_CHOSEN = _c * sympy.Max(T - _c, 0) ** 2 / (2 * T)  # those in front of a row's own, if they are spread evenly
_WHOLE = R * sympy.Max(T - 2 * _c, 0)  # what the rows that read all read besides
_READ = _LAST + _CHOSEN + _WHOLE  # pairs of a position and a column, of one head

SPARSE = Cost(
    bytes=B * K * ((G + 1) * T * (D + V) * e + C * 8),
    reread=B * K * _READ * G / m * (D + V) * e,
    flops=2 * B * K * G * _READ * (Dp + Vp),
    shared=(s - 1) * n * (Dp + Vp) * e,
    accumulators=m * (n + Vp),
    programs=B * K * sympy.ceiling(T * G / m),
    launches=NOTHING + 1,
)
