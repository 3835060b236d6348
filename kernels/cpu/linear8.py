"""Linear layers of few rows by linear8.cpp: weights in 8 bits, a scale for each row of a weight.

Half the bytes of linear.py's, so up to twice its rate where memory is what a step waits for. torch's own
(`_weight_int8pack_mm`) turns each number of a weight into a float, and is no faster than linear.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import VNNI
from specpass.kernels.cpu.linear import BLOCK, call, typed

LINE = 64  # columns that are read at a time
MOST = 127  # of 8 bits with a sign; -128 is left out, so that rows are symmetric


@functools.cache
def rows8() -> Callable[..., None] | Unbuilt:
    """What this machine multiplies few rows by weights in 8 bits by, or why nothing does. Compiles it on first use."""
    library = load(Source("linear8", VNNI))
    return library if isinstance(library, Unbuilt) else typed(library.linear_rows8)


def serves8(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a weight [N, K], real or fake, may be read in 8 bits."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.shape[0] >= BLOCK
        and weight.shape[1] % LINE == 0
        and (bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous()))
    )


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as whole numbers [N, K] in int8 and a float32 scale [N] of each row: the nearest of 255 values
    from minus to plus the row's largest."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(wide / scale[:, None]).to(torch.int8), scale


def multiply8(
    run: Callable[..., None],
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """x W^T scale + bias for each weight: [..., K] -> [..., N].

    Args: x of bfloat16; weights as `quantized` gives them, all of K columns.
    """
    return call(run, x, weights, scales, biases)
