"""Attention over the slots in use, in plain aten: readable, exact, any device.

Symbols: B batch, H query heads, K key/value heads, G = H / K, D and Dv head dimensions, C budget, N room for generated
tokens, P = C + N slots, q new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.kernels.attention import biased, first_read, modified_attention


def append_kv(
    keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None = None
) -> None:
    """Write q new KV pairs behind the slots in use, in place, and advance `lengths`.

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K]; key [B, K, q, D], value [B, K, q, Dv]; offsets
    [B, K] first slot of each head, None where all have P.
    """
    batch, kv_heads, count = key.shape[:3]
    slot = (lengths[:, :, None] + torch.arange(count, device=key.device))[..., None]
    if offsets is not None:
        slot = (slot + offsets[:, :, None, None]).flatten(1, 2)

    def write(storage: Tensor, new: Tensor) -> None:
        if offsets is not None:
            storage.scatter_(1, slot.expand(-1, -1, new.shape[3]), new.flatten(1, 2))
            return
        view = storage.view(batch, kv_heads, -1, new.shape[3])
        view.scatter_(2, slot.expand(-1, -1, -1, new.shape[3]), new)

    write(keys, key)
    write(values, value)
    lengths.add_(count)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Budgeted attention of q new queries; the GQA group is folded into the query length.

    Args: query [B, H, q, D]; keys [B, K, P, D], values [B, K, P, Dv]; lengths [B, K] with the q new slots counted;
    softcap, sinks: as `modified_attention`; sliding, chunk: as `first_read`, in slots, which then hold neighbouring
    positions, from the beginning of a chunk on; bias [B or 1, H, P] is added to the logits of each slot; offsets
    [B, K]: see `attend_ragged`.
    Returns: [B, H, q, Dv]; query i reads the slots below lengths - (q - 1 - i).
    """
    if offsets is not None:
        assert bias is None, "no pass adds one"
        return attend_ragged(query, keys, values, lengths, offsets, scale, softcap, sinks, sliding, chunk)
    batch, heads, count, dim = query.shape
    group = heads // keys.shape[1]
    mask = slots_read(lengths, count, keys.shape[2], group, sliding, chunk)
    if bias is not None:
        own = bias.unflatten(1, (-1, group))[:, :, :, None]  # [B or 1, K, G, 1, P]
        mask = biased(mask.unflatten(2, (-1, count)), own).flatten(2, 3)
    # scaled_dot_product_attention takes a mask that is added in the query's dtype alone.
    if softcap or sinks is not None or (bias is not None and query.dtype != torch.float32):
        return modified_attention(query, keys, values, mask.unflatten(2, (-1, count)), scale, softcap, sinks)
    folded = query.reshape(batch, keys.shape[1], group * count, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, values.shape[3])


def slots_read(lengths: Tensor, count: int, slots: int, group: int, sliding: int = 0, chunk: int = 0) -> Tensor:
    """Mask [B, K, 1 or G * q, P] of `attend`: which of P slots each of q queries reads."""
    limit = lengths[:, :, None] - torch.arange(count - 1, -1, -1, device=lengths.device)  # [B, K, q]
    slot = torch.arange(slots, device=lengths.device)
    mask = slot < limit[..., None]  # [B, K, q, P]
    if sliding or chunk:
        mask &= slot >= first_read(limit - 1, sliding, chunk)[..., None]
    if count > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(*lengths.shape, group * count, slots)
    return mask


def attend_ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
) -> Tensor:
    """`attend` where KV heads have budgets of their own: keys [B, T, D], values [B, T, Dv], head k at offsets [B, K].

    A step's few queries ask all T slots in one product and read their own head's. Several tokens at once would make
    masks and logits K times as large: on a CPU, which knows the lengths, each head then reads its own slots alone, and
    elsewhere one head's queries at a time ask all slots.
    """
    heads, count = query.shape[1:3]
    kv_heads = lengths.shape[1]
    group, changes = heads // kv_heads, (scale, softcap, sinks, sliding, chunk)
    if count > 1 and not query.is_cuda:
        return attend_heads(query, keys, values, lengths, offsets, *changes)
    owned = slots_owned(lengths, offsets, count, keys.shape[1], sliding, chunk)  # [B, K, q, T]
    states, out = (keys[:, None], values[:, None]), []
    step = kv_heads if count == 1 else 1
    for first in range(0, kv_heads, step):
        own = owned[:, first : first + step].repeat_interleave(group, 1)  # [B, h, q, T] of h query heads
        some = query[:, first * group : first * group + own.shape[1]]
        if softcap or sinks is not None:
            share = None if sinks is None else sinks[first * group : first * group + own.shape[1]]
            out.append(modified_attention(some, *states, own[:, None], scale, softcap, share))
            continue
        one = F.scaled_dot_product_attention(
            some.flatten(1, 2)[:, None], *states, attn_mask=own.flatten(1, 2)[:, None], scale=scale
        )
        out.append(one.view(*some.shape[:3], -1))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def attend_heads(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    sliding: int,
    chunk: int,
) -> Tensor:
    """`attend_ragged`, one head's slots at a time: reads `lengths` and `offsets` on the host."""
    batch, kv_heads = lengths.shape
    group = query.shape[1] // kv_heads
    out = query.new_empty(*query.shape[:3], values.shape[2])
    for row in range(batch):
        for head, (start, used) in enumerate(zip(offsets[row].tolist(), lengths[row].tolist(), strict=True)):
            own, place = slice(head * group, head * group + group), slice(start, start + used)
            share = None if sinks is None else sinks[own]
            out[row, own] = attend(
                query[row : row + 1, own],
                keys[row, place][None, None],
                values[row, place][None, None],
                lengths[row : row + 1, head : head + 1],
                scale,
                softcap,
                share,
                sliding,
                chunk,
            )[0]
    return out


def slots_owned(lengths: Tensor, offsets: Tensor, count: int, total: int, sliding: int = 0, chunk: int = 0) -> Tensor:
    """Mask [B, K, q, T] of `attend_ragged`: which of T slots each KV head's q queries read."""
    slot = (torch.arange(total, device=lengths.device) - offsets[:, :, None])[:, :, None]  # of the head's own
    limit = (lengths[:, :, None] - torch.arange(count - 1, -1, -1, device=lengths.device))[..., None]  # [B, K, q, 1]
    first = first_read(limit - 1, sliding, chunk) if sliding or chunk else 0
    return (slot >= first) & (slot < limit)


def append_attend(
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
) -> Tensor:
    """`append_kv` of one token, then `attend`: [B, H, 1, Dv].

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], changed in place; query [B, H, 1, D];
    key [B, K, 1, D], value [B, K, 1, Dv]; offsets [B, K] or None.
    """
    append_kv(keys, values, lengths, key, value, offsets)
    if offsets is None:
        keys, values = (states.unflatten(1, (key.shape[1], -1)) for states in (keys, values))
    return attend(query, keys, values, lengths, scale, softcap, sinks, sliding, chunk, None, offsets)


def append_attend_lse(
    keys: Tensor, values: Tensor, lengths: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`append_attend`, and the natural log-sum-exp [B, H, 1] float32 of the new token's row over the slots in use."""
    out = append_attend(keys, values, lengths, query, key, value, scale)
    stored = keys.unflatten(1, (key.shape[1], -1)).float()
    folded = query.float().reshape(*key.shape[:2], -1, key.shape[3])  # [B, K, G, D]
    logits = torch.matmul(folded, stored.transpose(2, 3)) * scale
    unread = ~slots_read(lengths, 1, stored.shape[2], folded.shape[2])
    return out, logits.masked_fill(unread, float("-inf")).logsumexp(-1).view(query.shape[:3])
