"""Storage as ONNX graphs pass it: [B, K, P, D], and written by value."""

from __future__ import annotations

import torch
from torch import Tensor


def by_head(storage: Tensor, kv_heads: int) -> Tensor:
    """[B, K * P, D] as [B, K, P, D]; unflatten(1, (K, -1)) would turn a symbolic P into a number."""
    batch, slots, dim = storage.shape
    return storage.reshape(batch, kv_heads, slots // kv_heads, dim)


def write_slots(storage: Tensor, lengths: Tensor, new: Tensor) -> Tensor:
    """Storage [B, K, P, D] with new [B, K, q, D] at the slots that start at lengths [B, K]."""
    slot = (lengths[:, :, None] + torch.arange(new.shape[2], device=new.device))[..., None]
    return storage.scatter(2, slot.expand(-1, -1, -1, new.shape[3]), new)
