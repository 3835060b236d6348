"""Attention of a prompt on a CPU with AMX: prefill.cpp, its operands, and where it serves.

Torch's flash attention for CPUs spends most of its time around its products: bench/results/prefill_attention.json.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load

SOURCE = Source(
    "prefill",
    needs=("amx_tile", "amx_bf16", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16"),
    flags=("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
_Strides = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """`Call` of prefill.cpp; what it finds out itself stands last, and is 0 here."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "T", "D", "Dv")),
        *((name, _Strides) for name in ("query_strides", "key_strides", "value_strides")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("window", "G", "R", "columns")),
    )


def _library() -> ctypes.CDLL | Unbuilt:
    library = load(SOURCE)
    if isinstance(library, Unbuilt):
        return library
    library.prefill.argtypes, library.prefill.restype = (ctypes.POINTER(_Call),), None
    return Unbuilt("the system gives this process no AMX tiles") if library.allow() else library  # asking twice is free


def refuse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> str | None:
    """Why `prefill` does not serve these tensors (fake ones are read too), or None. May compile prefill.cpp."""
    if query.device.type != "cpu":
        return f"{query.device.type} tensors"
    if any(states.dtype != torch.bfloat16 for states in (query, key, value)):
        return f"{str(query.dtype).removeprefix('torch.')}, where AMX multiplies bfloat16"
    for dim in (query.shape[3], value.shape[3]):
        if dim % 32 or dim > 512:
            return f"head dimension {dim}: at most 512 and a multiple of 32"
    if any(states.stride(3) != 1 for states in (query, key, value)) or not scale > 0:
        return "rows that are not contiguous, or a scale that is not above 0"
    library = _library()
    return str(library) if isinstance(library, Unbuilt) else None


def prefill(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int = 0) -> tuple[Tensor, Tensor]:
    """Causal attention of tensors that `refuse` lets through.

    Args: query [B, H, T, D], key [B, K, T, D], value [B, K, T, Dv]; sliding: positions that a query reads, 0 for all.
    Returns: [B, H, T, Dv], lying in memory as [B, T, H, Dv]; its natural log-sum-exp [B, H, T] float32.
    """
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    batch, heads, columns, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    out = query.new_empty(batch, columns, heads, value_dim)
    lse = query.new_empty(batch, heads, columns, dtype=torch.float32)
    tiles = [query.new_empty(batch * kv_heads * -(-columns // 32) * 32 * size) for size in (dim, value_dim)]
    addresses = (tensor.data_ptr() for tensor in (query, key, value, out, lse, *tiles))
    strides = (_Strides(*states.stride()[:3]) for states in (query, key, value))
    torch.get_num_threads()  # sets OpenMP's number in a thread of Python's that has not run torch yet
    library.prefill(_Call(*addresses, batch, heads, kv_heads, columns, dim, value_dim, *strides, scale, sliding))
    return out.transpose(1, 2), lse
