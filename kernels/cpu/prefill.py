"""Attention of a prompt on a CPU: prefill.cpp, its operands, and where it serves.

Torch's flash attention for CPUs spends most of its time around its products: bench/results/prefill_attention.json.
"""

from __future__ import annotations

import ctypes
import dataclasses

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.tiles import Strides, library, refuse_tensors, strides


class _Call(ctypes.Structure):
    """`Call` of prefill.cpp; what it finds out itself stands last, and is 0 here."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "T", "D", "Dv")),
        *((name, Strides) for name in ("query_strides", "key_strides", "value_strides")),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("chosen", "exact", "chosen_keys", "chosen_values")),
        *((name, ctypes.c_int64) for name in ("V", "G", "R", "columns", "far")),
    )


def refuse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    """Why `prefill` does not serve these tensors (fake ones are read too), or None. May compile prefill.cpp."""
    refused = refuse_tensors(scale, query, key, value)
    if refused is not None:
        return refused
    found = library("prefill")
    return str(found) if isinstance(found, Unbuilt) else None


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Which positions a query reads in front of its last ones, and which queries read all.

    Args: columns [B, K, V] int64, ascending, -1 last; exact [B, 2] int64: the first query that reads all, and the end.
    """

    columns: Tensor
    exact: Tensor


def prefill(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int = 0, sparse: Sparse | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of tensors that `refuse` lets through.

    Args: query [B, H, T, D], key [B, K, T, D], value [B, K, T, Dv]; sliding: positions that a query reads, 0 for all;
    sparse: what it reads besides, if `sliding` is not 0.
    Returns: [B, H, T, Dv], lying in memory as [B, T, H, Dv]; its natural log-sum-exp [B, H, T] float32.
    """
    found = library("prefill")
    assert isinstance(found, ctypes.CDLL)
    batch, heads, columns, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    out = query.new_empty(batch, columns, heads, value_dim)
    lse = query.new_empty(batch, heads, columns, dtype=torch.float32)
    count = 0 if sparse is None else sparse.columns.shape[2]
    tiles, chosen_tiles = (
        [query.new_empty(batch * kv_heads * -(-rows // 32) * 32 * size) for size in (dim, value_dim)]
        for rows in (columns, count)
    )
    chosen = () if sparse is None else (sparse.columns.contiguous(), sparse.exact.contiguous())
    addresses = (tensor.data_ptr() for tensor in (query, key, value, out, lse, *tiles))
    steps = map(strides, (query, key, value))
    call = _Call(*addresses, batch, heads, kv_heads, columns, dim, value_dim, *steps, scale, sliding)
    if sparse is not None:
        call.chosen, call.exact, call.chosen_keys, call.chosen_values = (t.data_ptr() for t in (*chosen, *chosen_tiles))
        call.V = count
    torch.get_num_threads()  # sets OpenMP's number in a thread of Python's that has not run torch yet
    found.prefill(ctypes.byref(call))
    return out.transpose(1, 2), lse
