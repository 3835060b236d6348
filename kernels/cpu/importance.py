"""`importance` on a CPU: importance.cpp, its operands, and where it serves."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.tiles import Strides, library, refuse_tensors, strides


class _Call(ctypes.Structure):
    """`Call` of importance.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "rows", "weights", "lse", "scores")),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "R", "T", "D")),
        *((name, Strides) for name in ("query_strides", "key_strides")),
        ("scale", ctypes.c_float),
        ("sum", ctypes.c_int64),
    )


def refuse(query: Tensor, key: Tensor, scale: float) -> str | None:
    """Why `importance` does not serve these tensors (fake ones are read too), or None. May compile importance.cpp."""
    refused = refuse_tensors(scale, query, key)
    if refused is not None:
        return refused
    found = library("importance")
    return str(found) if isinstance(found, Unbuilt) else None


def importance(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """As the reference (specpass.kernels.importance.reference), of tensors that `refuse` lets through."""
    found = library("importance")
    assert isinstance(found, ctypes.CDLL)
    batch, heads, count, dim = query.shape
    kv_heads, columns = key.shape[1:3]
    scores = torch.empty(batch, kv_heads, columns)
    own = rows.contiguous(), *(None if each is None else each.float().contiguous() for each in (weights, lse))
    addresses = (None if each is None else each.data_ptr() for each in (query, key, *own, scores))
    sizes = (batch, heads, kv_heads, count, columns, dim)
    torch.get_num_threads()  # see prefill.py
    found.importance(ctypes.byref(_Call(*addresses, *sizes, strides(query), strides(key), scale, int(reduce != "max"))))
    if reduce == "mean":
        live = (rows >= 0).sum(1).clamp(min=1)
        scores /= (heads // kv_heads * live)[:, None, None]
    outside = torch.arange(columns) >= (lengths - window)[:, None]
    return scores.masked_fill_(outside[:, None], 0.0)
