"""Linear layers of few rows by linear.cpp (bfloat16) and linear32.cpp (float32, and bfloat16 with AVX2 alone): weights
are read once, as they lie.

`python -m bench.step_kernels` times them beside torch's product, oneDNN's with packed weights (a second copy) and a
plain read of the same bytes. Vectors serve few rows, AMX more.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import AMX, AVX2, AVX512, Isa, multiplies
from specpass.kernels.shapes import name_of

BLOCK, LINE = 16, 64  # rows of a weight that are read side by side, and bytes of a row at a time
DTYPES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The function of a library, and the most rows of x that it is faster than F.linear for."""

    run: Callable[..., None]
    most: int
    how: str


@functools.cache
def few_rows(dtype: torch.dtype) -> Rows | Unbuilt:
    """What this machine multiplies few rows of a dtype by, or why nothing does. Compiles it on first use."""
    if dtype == torch.bfloat16:
        for isa, most, how in ((AMX, 32, "AMX tiles"), (AVX512, 8, "dot products of AVX-512")):
            found = prepared(isa, most, how)
            if not isinstance(found, Unbuilt):
                return found
    return vectors(dtype)


def prepared(isa: Isa, most: int, how: str) -> Rows | Unbuilt:
    """linear.cpp, compiled for `isa`."""
    library = load(Source("linear", isa))
    if isinstance(library, Unbuilt):
        return library
    if library.linear_prepare():
        return Unbuilt(f"the system does not let this process use {how}")
    return Rows(typed(library.linear_rows), most, how)


def vectors(dtype: torch.dtype) -> Rows | Unbuilt:
    """linear32.cpp for a dtype."""
    library = load(Source("linear32", AVX2))
    if isinstance(library, Unbuilt):
        return library
    most = 16 if multiplies(dtype) else 64  # beyond, torch's product is faster, or wide.py's
    return Rows(typed(library[f"linear_{name_of(dtype)}"]), most, "vectors of AVX2")


def typed(run: Callable[..., None]) -> Callable[..., None]:
    """A library's function, told how it is called."""
    run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]  # type: ignore[attr-defined]
    return run


def serves(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a library multiplies by this weight [N, K], real or fake."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.dim() == 2
        and weight.stride(1) == 1
        and weight.shape[0] >= BLOCK
        and weight.shape[1] * weight.dtype.itemsize % LINE == 0
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
    )


def multiply(rows: Rows, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x W^T + bias for each weight: [..., K] -> [..., N].

    Args: x with 1 to `rows.most` rows, of the weights' dtype; weights that are served, all of K columns.
    """
    return call(rows.run, x, weights, [None] * len(weights), biases)


def call(
    run: Callable[..., None],
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """A library's function on the parts of linear.h: x W^T scale + bias for each weight, [..., K] -> [..., N]."""
    inner = x.shape[-1]
    x = x.contiguous()
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    parts = [
        number
        for weight, scale, bias, out in zip(weights, scales, biases, outs, strict=True)
        for number in (weight.data_ptr(), weight.stride(0), _at(scale), _at(bias), out.data_ptr(), weight.shape[0])
    ]
    torch.get_num_threads()  # sets OpenMP's number in a thread of Python's that has not run torch yet
    run((ctypes.c_int64 * len(parts))(*parts), len(outs), x.data_ptr(), x.numel() // inner, inner)
    return outs


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
