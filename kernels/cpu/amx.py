"""What kernels that multiply in tiles (AMX) share: what they need, and which tensors they take."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load

_NEEDS = ("amx_tile", "amx_bf16", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16")
_FLAGS = ("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma")
Strides = ctypes.c_int64 * 3


def library(name: str) -> ctypes.CDLL | Unbuilt:
    """The library of `name`.cpp, of a process that may use tiles; or why there is none."""
    found = load(Source(name, _NEEDS, _FLAGS))
    if isinstance(found, Unbuilt):
        return found
    return Unbuilt("the system gives this process no AMX tiles") if found.allow() else found  # asking twice is free


def refuse_tensors(scale: float, *tensors: Tensor) -> str | None:
    """Why tensors [B, heads, T, D] (fake ones are read too) with this scale cannot be multiplied in tiles, or None."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"{first.device.type} tensors"
    if any(states.dtype != torch.bfloat16 for states in tensors):
        return f"{str(first.dtype).removeprefix('torch.')}, where AMX multiplies bfloat16"
    for dim in (states.shape[3] for states in tensors):
        if dim % 32 or dim > 512:
            return f"head dimension {dim}: at most 512 and a multiple of 32"
    if any(states.stride(3) != 1 for states in tensors) or not scale > 0:
        return "rows that are not contiguous, or a scale that is not above 0"
    return None


def strides(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Of the first three axes of [B, heads, T, D], in elements."""
    return Strides(*tensor.stride()[:3])
