"""A step's attention on a CPU, of one token or a few: decode.cpp, its operands, and where it serves.

Aten takes a dozen operators for it, whose calls take longer than what they do (`python -m bench.step_kernels`).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import AVX512
from specpass.kernels.spec import Operands

SOURCE = Source("decode", AVX512)
_Strides = ctypes.c_int64 * 3
MOST = 8  # new tokens: a second turn's are aten's
_POINTERS = ("keys", "values", "lengths", "offsets", "query", "key", "value", "out", "lse")


class _Call(ctypes.Structure):
    """`Call` of decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "q", "P", "D", "Dv")),
        *((name, _Strides) for name in ("query_strides", "key_strides", "value_strides")),
        ("scale", ctypes.c_float),
        ("sliding", ctypes.c_int64),
    )


def _library() -> ctypes.CDLL | Unbuilt:
    library = load(SOURCE)
    if not isinstance(library, Unbuilt):
        library.append_attend.argtypes, library.append_attend.restype = (ctypes.POINTER(_Call),), ctypes.c_int
    return library


def refuse(operands: Operands) -> str | None:
    """Why `append_attend` does not serve these operands of the operator (fake ones are read too), or None."""
    states: list[Tensor] = [operands[name] for name in ("keys", "values", "query", "key", "value")]
    if any(tensor.dtype != torch.bfloat16 for tensor in states):
        return f"{str(states[2].dtype).removeprefix('torch.')}, where AVX-512 multiplies bfloat16"
    for dim in (states[0].shape[2], states[1].shape[2]):
        if dim % 32:
            return f"head dimension {dim}: no multiple of 32"
    if isinstance(count := states[2].shape[2], int) and count > MOST:  # a symbol: each call asks anew
        return f"{count} new tokens: more than {MOST} are aten's"
    if operands.get("softcap") or operands.get("chunk") or operands.get("sinks") is not None:
        return "soft caps, sinks and chunks are aten's"
    offsets = operands.get("offsets")
    stored = (*states[:2], operands["lengths"], *(() if offsets is None else (offsets,)))
    if any(tensor.stride(-1) != 1 for tensor in states) or not all(tensor.is_contiguous() for tensor in stored):
        return "rows that are not contiguous"
    library = _library()
    return str(library) if isinstance(library, Unbuilt) else None


def append_attend(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sliding: int = 0,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator's result [B, H, q, Dv], and its natural log-sum-exp [B, H, q] float32.

    Raises: IndexError: a KV head has no q free slots; of heads with budgets of their own: the storage ends.
    """
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    batch, kv_heads = lengths.shape
    heads, count = query.shape[1:3]
    dim, value_dim = keys.shape[2], values.shape[2]
    out = query.new_empty(batch, heads, count, value_dim)
    lse = query.new_empty(batch, heads, count, dtype=torch.float32)
    tensors = (keys, values, lengths, offsets, query, key, value, out, lse)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    strides = (_Strides(*tensor.stride()[:3]) for tensor in (query, key, value))
    slots = keys.shape[1] // kv_heads if offsets is None else keys.shape[1]
    sizes = (batch, heads, kv_heads, count, slots, dim, value_dim)
    torch.get_num_threads()  # sets OpenMP's number in a thread of Python's that has not run torch yet
    if library.append_attend(_Call(*addresses, *sizes, *strides, scale, sliding)):
        raise IndexError(f"no free slot: {slots} are in use")
    return out, lse
