"""What kernels of a prompt on a CPU share (tiles.h): what they need of it, and which tensors they take."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import AMX, AVX512, Isa
from specpass.kernels.shapes import dtype_of

Strides = ctypes.c_int64 * 3


def library(name: str) -> ctypes.CDLL | Unbuilt:
    """`name`.cpp for the best that this process may use; or why there is none. Asking twice is free."""
    found = prepared(name, AMX)
    return prepared(name, AVX512) if isinstance(found, Unbuilt) else found


def prepared(name: str, isa: Isa) -> ctypes.CDLL | Unbuilt:
    """`name`.cpp, compiled for `isa`."""
    found = load(Source(name, isa))
    if isinstance(found, Unbuilt):
        return found
    return Unbuilt(f"the system gives this process no {isa.title} tiles") if found.allow() else found


def refuse_tensors(scale: float, *tensors: Tensor) -> str | None:
    """Why tensors [B, heads, T, D] (fake ones are read too) with this scale cannot be multiplied in tiles, or None."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"{first.device.type} tensors"
    if any(states.dtype != torch.bfloat16 for states in tensors):
        return f"{dtype_of(first)}, where AMX and AVX-512 multiply bfloat16"
    for dim in (states.shape[3] for states in tensors):
        if dim % 32 or dim > 512:
            return f"head dimension {dim}: at most 512 and a multiple of 32"
    if any(states.stride(3) != 1 for states in tensors) or not scale > 0:
        return "rows that are not contiguous, or a scale that is not above 0"
    return None


def strides(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Of the first three axes of [B, heads, T, D], in elements."""
    return Strides(*tensor.stride()[:3])
