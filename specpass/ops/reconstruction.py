"""Scores by what a row's output loses without a column."""

from __future__ import annotations

from typing import Any

import torch

from specpass.dialect import reconstruction as dialect
from specpass.kernels.reconstruction.reference import reconstruction
from specpass.ops.bind import bind


def reconstruction_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """query [B, H, R, D], key [B, K, T, D], value [B, K, T, Dv]: logits, outputs, and their products with values."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * (dim + 2 * value[3])


bind(dialect.Reconstruction, reconstruction, flops=reconstruction_flops)
