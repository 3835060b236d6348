"""A step's attention on a CPU, of one token or a few: decode.cpp and decode32.cpp, their operands, and what they serve.

Aten takes a dozen operators for it, whose calls take longer than what they do (`python -m bench.step_kernels`), and a
dozen for each head where heads have budgets of their own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import AVX2, AVX512
from specpass.kernels.shapes import name_of
from specpass.kernels.spec import Operands

MOST = 8  # new tokens: a second turn's are aten's
_Strides = ctypes.c_int64 * 3
_POINTERS = ("keys", "values", "lengths", "offsets", "query", "key", "value", "out", "lse", "sinks")


class _Call(ctypes.Structure):
    """`Call` of decode.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("B", "H", "K", "q", "P", "D", "Dv")),
        *((name, _Strides) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int64) for name in ("sliding", "chunk")),
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """A library that attends.

    Args: dtypes: of K and V that it reads; block: of which head dimensions are multiples; changes: whether it knows of
    soft caps, sinks and chunks.
    """

    source: Source
    dtypes: tuple[torch.dtype, ...]
    block: int
    changes: bool

    def library(self) -> ctypes.CDLL | Unbuilt:
        return load(self.source)

    def refuse(self, operands: Operands) -> str | None:
        """Why these operands of `append_attend` are not served (fake ones are read too), or None."""
        states: list[Tensor] = [operands[name] for name in ("keys", "values", "query", "key", "value")]
        dtype = states[0].dtype
        if dtype not in self.dtypes or any(tensor.dtype != dtype for tensor in states):
            return f"{name_of(states[2].dtype)}, where {self.source.isa.title} reads {self.reads}"
        for dim in (states[0].shape[2], states[1].shape[2]):
            if dim % self.block:
                return f"head dimension {dim}: no multiple of {self.block}"
        if isinstance(count := states[2].shape[2], int) and count > MOST:  # a symbol: each call asks anew
            return f"{count} new tokens: more than {MOST} are aten's"
        changed = operands.get("softcap") or operands.get("chunk") or operands.get("sinks") is not None
        if changed and not self.changes:
            return "soft caps, sinks and chunks"
        offsets = operands.get("offsets")
        stored = (*states[:2], operands["lengths"], *(() if offsets is None else (offsets,)))
        if any(tensor.stride(-1) != 1 for tensor in states) or not all(tensor.is_contiguous() for tensor in stored):
            return "rows that are not contiguous"
        library = self.library()
        return str(library) if isinstance(library, Unbuilt) else None

    @functools.cached_property  # each call of a step asks for both
    def reads(self) -> str:
        return " and ".join(map(name_of, self.dtypes))

    @functools.cached_property
    def reason(self) -> str:
        return f"{self.reads} on a CPU with {self.source.isa.title}"


# By the name that reports give, in the order in which they are asked.
WAYS = {
    "decode_avx512": Way(Source("decode", AVX512), (torch.bfloat16,), 32, changes=False),
    "decode_avx2": Way(Source("decode32", AVX2), (torch.float32, torch.bfloat16), 8, changes=True),
}


def served(operands: Operands) -> tuple[str | None, str]:
    """The way that serves these operands of `append_attend`, real or fake, None where aten does; and why."""
    refused = "no way"
    for name, way in WAYS.items():
        found = way.refuse(operands)
        if found is None:
            return name, way.reason
        refused = found
    return None, refused


def append_attend(
    name: str,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By the way of that name: the operator's result [B, H, q, Dv], and its natural log-sum-exp [B, H, q] float32.

    Raises: IndexError: a KV head has no q free slots; of heads with budgets of their own: the storage ends.
    """
    library = WAYS[name].library()
    assert isinstance(library, ctypes.CDLL)
    attend = getattr(library, f"append_attend_{name_of(keys.dtype)}")
    batch, kv_heads = lengths.shape
    heads, count = query.shape[1:3]
    dim, value_dim = keys.shape[2], values.shape[2]
    out = query.new_empty(batch, heads, count, value_dim)
    lse = query.new_empty(batch, heads, count, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    tensors = (keys, values, lengths, offsets, query, key, value, out, lse, sinks)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    strides = (_Strides(*tensor.stride()[:3]) for tensor in (query, key, value))
    slots = keys.shape[1] // kv_heads if offsets is None else keys.shape[1]
    sizes = (batch, heads, kv_heads, count, slots, dim, value_dim)
    torch.get_num_threads()  # sets OpenMP's number in a thread of Python's that has not run torch yet
    if attend(ctypes.byref(_Call(*addresses, *sizes, *strides, scale, softcap, sliding, chunk))):
        raise IndexError(f"no free slot: {slots} are in use")
    return out, lse
