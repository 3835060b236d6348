"""Rows of a batch, repeated."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_rows(tensor: Tensor, repeats: int) -> Tensor:
    """[B, ...] -> [B * repeats, ...], each row `repeats` times, one behind the other.

    `Tensor.repeat_interleave` makes a view of [B, repeats, ...], for whose sizes a graph would be compiled.
    """
    return tensor.index_select(0, torch.arange(len(tensor), device=tensor.device).repeat_interleave(repeats))
