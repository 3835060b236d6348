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


def split_lookahead(storage: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Storage [B, K, C + L, D] of positions [B, K, C] as what was kept [B, K, C, D] and the lookahead [B, K, L, D].

    The lookahead stands right behind the slots in use, of which a short prompt has less than C.
    """
    budget = positions.shape[2]
    used, ahead = (positions >= 0).sum(-1, keepdim=True), storage.shape[2] - budget
    slot = (used + torch.arange(ahead, device=storage.device))[..., None]
    kept = storage[:, :, :budget].masked_fill((positions < 0)[..., None], 0)
    return kept, storage.gather(2, slot.expand(-1, -1, -1, storage.shape[3]))
