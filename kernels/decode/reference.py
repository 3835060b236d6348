"""Attention over the slots in use, in plain aten: readable, exact, any device.

Symbols: B batch, H query heads, K key/value heads, G = H / K, D and Dv head dimensions, C budget, N room for generated
tokens, P = C + N slots, q new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.kernels.attention import biased, first_read, modified_attention


def append_kv(keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    """Write q new KV pairs behind the slots in use, in place, and advance `lengths`.

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K]; key [B, K, q, D], value [B, K, q, Dv].
    """
    batch, kv_heads, count = key.shape[:3]
    slot = (lengths[:, :, None] + torch.arange(count, device=key.device))[..., None]

    def write(storage: Tensor, new: Tensor) -> None:
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
) -> Tensor:
    """Budgeted attention of q new queries; the GQA group is folded into the query length.

    Args: query [B, H, q, D]; keys [B, K, P, D], values [B, K, P, Dv]; lengths [B, K] with the q new slots counted;
    softcap, sinks: as `modified_attention`; sliding, chunk: as `first_read`, in slots, which then hold neighbouring
    positions, from the beginning of a chunk on; bias [B or 1, H, P] is added to the logits of each slot.
    Returns: [B, H, q, Dv]; query i reads the slots below lengths - (q - 1 - i).
    """
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
) -> Tensor:
    """`append_kv` of one token, then `attend`: [B, H, 1, Dv].

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], changed in place; query [B, H, 1, D];
    key [B, K, 1, D], value [B, K, 1, Dv].
    """
    append_kv(keys, values, lengths, key, value)
    keys, values = (states.unflatten(1, (key.shape[1], -1)) for states in (keys, values))
    return attend(query, keys, values, lengths, scale, softcap, sinks, sliding, chunk)


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
