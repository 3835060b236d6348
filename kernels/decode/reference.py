"""Attention over the slots in use, in plain aten: readable, exact, any device.

Symbols: B batch, H query heads, K key/value heads, G = H / K, D and Dv head dimensions, C budget, N room for generated
tokens, P = C + N slots, q new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specpass.kernels.attention import biased, first_read, modified_attention
from specpass.kernels.bits.reference import attend_quantized
from specpass.kernels.cpu.wide import sdpa


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
    layers: int = 1,
    quantized: Sequence[Tensor] | None = None,
    bits: int = 0,
) -> Tensor:
    """Budgeted attention of q new queries; the GQA group is folded into the query length.

    Args: query [B, H, q, D]; keys [B, K, P, D], values [B, K, P, Dv]; lengths [B, K] with the q new slots counted;
    softcap, sinks: as `modified_attention`; sliding, chunk: as `first_read`, in slots, which then hold neighbouring
    positions, from the beginning of a chunk on; bias [B or 1, H, P] is added to the logits of each slot; offsets
    [B, K]: see `attend_ragged`; layers: whose heads lie in that storage, for those who count what is read; quantized:
    codes, counts and basis of a prompt in so many `bits`, which stands in front of the slots (`attend_quantized`).
    Returns: [B, H, q, Dv]; query i reads the slots below lengths - (q - 1 - i).
    """
    if quantized is not None:
        assert bias is None, "such layers are left as they are"
        assert not sliding
        assert not chunk
        codes, counts, basis = quantized
        return attend_quantized(query, keys, values, lengths, codes, counts, basis, bits, scale, softcap, sinks)
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
    out = sdpa(folded, keys, values, attn_mask=mask, scale=scale)
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

    Where lengths lie on the host, each head reads its own slots alone. On CUDA, which waits for no number, masks say
    which slots are its own: single tokens have a kernel there.
    """
    how = attend_masked if query.is_cuda else attend_heads
    return how(query, keys, values, lengths, offsets, scale, softcap, sinks, sliding, chunk)


def attend_masked(
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
    """`attend_ragged` without a look at lengths: one head's queries at a time ask all T slots."""
    count, kv_heads = query.shape[2], lengths.shape[1]
    group, out = query.shape[1] // kv_heads, query.new_empty(*query.shape[:3], values.shape[2])
    owned = slots_owned(lengths, offsets, count, keys.shape[1], sliding, chunk)  # [B, K, q, T]
    for head in range(kv_heads):
        own = slice(head * group, head * group + group)
        share = None if sinks is None else sinks[own]
        mask = owned[:, head : head + 1]
        out[:, own] = modified_attention(query[:, own], keys[:, None], values[:, None], mask, scale, softcap, share)
    return out


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
    group, plain = query.shape[1] // kv_heads, query.shape[2] == 1 and not (softcap or sliding or chunk)
    out = query.new_empty(*query.shape[:3], values.shape[2])
    for row in range(batch):
        for head, (start, used) in enumerate(zip(offsets[row].tolist(), lengths[row].tolist(), strict=True)):
            own, place = slice(head * group, head * group + group), slice(start, start + used)
            some, states = query[row : row + 1, own], (keys[row, place][None, None], values[row, place][None, None])
            if plain and sinks is None:
                one = sdpa(some.transpose(1, 2), *states, scale=scale).transpose(1, 2)
            else:
                share = None if sinks is None else sinks[own]
                count = lengths[row : row + 1, head : head + 1]
                one = attend(some, *states, count, scale, softcap, share, sliding, chunk)
            out[row, own] = one[0]
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
    layers: int = 1,
) -> Tensor:
    """`append_kv`, then `attend`: [B, H, q, Dv].

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], changed in place; query [B, H, q, D];
    key [B, K, q, D], value [B, K, q, Dv]; offsets [B, K] or None; layers: as in `attend`.
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
