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


def share_layers(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: list[Tensor],
    positions: list[Tensor],
    scores: list[Tensor],
    budget: int,
    ahead: int,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The best candidates of n layers as one storage; see the operator.

    Args: keys [B, K (X + L), D], values [B, K (X + L), Dv] of each layer, heads behind each other; lengths [B, K]
    without the lookahead's L = `ahead`; positions [B, K X]; scores as these, or none: all are kept; budget C of each
    head in the mean; room N.
    """
    every, heads = torch.cat(positions, 1), sum(own.shape[1] for own in lengths)
    total = heads * budget
    places = [slot_sources(own, some.shape[1], 0) for own, some in zip(lengths, positions, strict=True)]
    firsts = range(0, heads, lengths[0].shape[1])  # the number of each layer's first head
    head = torch.cat([own + first for (own, _), first in zip(places, firsts, strict=True)], 1)
    keep = every >= 0
    if scores:
        worth = torch.cat(scores, 1)
        best = torch.sort(worth, dim=1, descending=True, stable=True).indices[:, :total]
        keep = torch.zeros_like(keep).scatter(1, best, True) & keep
    counts = torch.zeros(every.shape[0], heads, dtype=torch.int64, device=every.device).scatter_add(
        1, head, keep.long()
    )
    starts = head_offsets(counts, room)
    rank = keep.cumsum(1) - 1  # among all that is kept
    before = (counts.cumsum(1) - counts).gather(1, head)  # of that, in front of the head
    place = starts.gather(1, head) + rank - before
    row = torch.arange(every.shape[0], device=every.device)[:, None]
    packed = torch.full((every.shape[0], total + 1), -1, dtype=every.dtype, device=every.device)
    packed.scatter_(1, torch.where(keep, rank, total), every)
    columns = torch.arange(ahead, device=every.device)

    def share(states: list[Tensor]) -> Tensor:
        storage = states[0].new_zeros(every.shape[0], total + heads * room, states[0].shape[2])
        begin = 0
        for own, (local, _), count, first in zip(states, places, lengths, firsts, strict=True):
            part = slice(begin, begin + local.shape[1])
            begin = part.stop
            # What is dropped is written as its row's last kept candidate once more: each slot gets one state.
            kept, goes = keep[:, part], place[:, part]
            source = torch.arange(local.shape[1], device=every.device) + local * ahead
            some = torch.where(kept, torch.arange(local.shape[1], device=every.device), -1).argmax(1, keepdim=True)
            source = torch.where(kept, source, source.gather(1, some))
            storage[row, torch.where(kept, goes, goes.gather(1, some))] = own[row, source]
            if ahead:
                mine = slice(first, first + count.shape[1])
                behind = head_offsets(count, ahead) + count, starts[:, mine] + counts[:, mine]
                read, written = ((each[..., None] + columns).flatten(1) for each in behind)
                storage[row, written] = own[row, read]
        return storage

    about = (
        [part.clone(memory_format=torch.contiguous_format) for part in each.split(lengths[0].shape[1], 1)]
        for each in (counts, starts, counts)
    )
    return share(keys), share(values), packed[:, :total].clone(memory_format=torch.contiguous_format), *about


def offsets_and_lengths(lengths: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """`head_offsets`, and lengths again, which stay where the others advance."""
    return head_offsets(lengths, room), lengths.clone()


def head_offsets(lengths: Tensor, room: int) -> Tensor:
    """[B, K]: where a head's slots start, behind those of its predecessors, lengths [B, K], and N of room for each."""
    own = lengths + room
    return own.cumsum(1) - own


def slot_sources(lengths: Tensor, total: int, room: int) -> tuple[Tensor, Tensor]:
    """Whose slots they are: head [B, total], and the slot's number among the head's; -1 behind the last head's room."""
    offsets = head_offsets(lengths, room)
    slot = torch.arange(total, device=lengths.device).expand(lengths.shape[0], -1).contiguous()
    head = torch.searchsorted(offsets, slot, right=True) - 1  # of heads without slots the last, which starts there too
    rank = slot - offsets.gather(1, head)
    return head, rank.masked_fill(rank >= lengths.gather(1, head) + room, -1)
