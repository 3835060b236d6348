"""gather_kv in plain aten: readable, exact, any device. Its ragged form too, whose heads have budgets of their own.

Symbols: B batch, K key/value heads, T columns, D and Dv head dimensions, C budget, N room for generated tokens, M most
positions of a ragged head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(key: Tensor, value: Tensor, positions: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compact K and V into the cache's storage.

    Args: key [B, K, T, D], value [B, K, T, Dv]; positions [B, K, C] (-1: unused); room N.
    Returns: keys [B, K * (C + N), D], values [B, K * (C + N), Dv], lengths [B, K] int64 (slots in use).
    """
    batch, kv_heads, budget = positions.shape
    index = positions.clamp(min=0)[..., None]
    unused = (positions < 0)[..., None]

    def compact(states: Tensor) -> Tensor:
        dim = states.shape[3]
        kept = states.gather(2, index.expand(-1, -1, -1, dim)).masked_fill(unused, 0)
        storage = states.new_zeros(batch, kv_heads * (budget + room), dim)  # no view: decode has a graph for each kind
        storage.view(batch, kv_heads, budget + room, dim)[:, :, :budget] = kept
        return storage

    return compact(key), compact(value), (positions >= 0).sum(-1)


def gather_ragged(
    key: Tensor, value: Tensor, positions: Tensor, slots: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compact K and V into storage whose heads lie behind each other, each as long as what it keeps and its room.

    Args: key [B, K, T, D], value [B, K, T, Dv]; positions [B, K, M], unused ones last, -1; slots: for all heads
    together, no fewer than are used; room N.
    Returns: keys [B, slots + K * N, D], values, lengths [B, K] int64 (slots in use).
    """
    batch, kv_heads = positions.shape[:2]
    lengths = (positions >= 0).sum(-1)
    head, rank = slot_sources(lengths, slots + kv_heads * room, room)
    inside = (rank >= 0) & (rank < positions.shape[2])
    source = positions.flatten(1).gather(1, torch.where(inside, head * positions.shape[2] + rank, 0))
    source = torch.where(inside, source, -1)
    row = torch.arange(batch, device=positions.device)[:, None]

    def compact(states: Tensor) -> Tensor:
        return states[row, head, source.clamp(min=0)].masked_fill((source < 0)[..., None], 0)

    return compact(key), compact(value), lengths


def head_offsets(lengths: Tensor, room: int) -> Tensor:
    """[B, K]: where a head's slots start, behind those of its predecessors, lengths [B, K], and N of room for each."""
    own = lengths + room
    return own.cumsum(1) - own


def slot_sources(lengths: Tensor, total: int, room: int) -> tuple[Tensor, Tensor]:
    """Whose slots they are: head [B, total], and the slot's number among the head's; -1 behind the last head's room."""
    offsets = head_offsets(lengths, room)
    slot = torch.arange(total, device=lengths.device).expand(len(lengths), -1).contiguous()
    head = torch.searchsorted(offsets, slot, right=True) - 1  # of heads without slots the last, which starts there too
    rank = slot - offsets.gather(1, head)
    return head, rank.masked_fill(rank >= lengths.gather(1, head) + room, -1)
