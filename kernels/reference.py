"""Plain aten references of the operators that pruned graphs hold: readable, exact, any device.

Symbols: B batch, S prompt length, L lookahead, T = S + L columns, H query heads, K key/value heads, G = H / K,
D head dimension, W window, C budget, N room for generated tokens, P = C + N slots, R query rows that score.
Rows are packed: row b's tokens stand at 0 .. lengths[b] - 1, whatever padding the caller had.
Formulas: arXiv 2506.08373; SnapKV (2404.14469).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def importance(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention probability that each prompt column gets from the query rows, reduced over the rows of a KV head.

    Args: query [B, H, R, D]; key [B, K, T, D]; rows [B, R] positions (-1: left out); lengths [B] prompt lengths;
    reduce "max", "mean" or "sum"; weights [R] float32 >= 0 of the rows, or None; lse [B, H, R] float32: the rows'
    natural log-sum-exp over the columns that they see, where `prefill_attention_lse` found it already; softcap, sinks:
    as `modified_attention`.
    Returns: scores [B, K, T] float32; columns outside [0, lengths - W) are 0.
    """
    batch, heads, count, dim = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * count, dim).float()  # K is never repeated to H heads
    logits = soft_capped(torch.matmul(folded, key.float().transpose(2, 3)) * scale, softcap)
    column = torch.arange(columns, device=key.device)
    hidden = (column > rows[:, :, None])[:, None, None]  # [B, 1, 1, R, T]
    logits = logits.view(batch, kv_heads, group, count, columns).masked_fill_(hidden, float("-inf"))
    live = rows >= 0
    if lse is None:
        probabilities = softmax_with_sinks(logits, None if sinks is None else sinks.view(kv_heads, group, 1))
        probabilities = probabilities.masked_fill(~live[:, None, None, :, None], 0.0)
        if weights is not None:
            probabilities = probabilities * weights[:, None]
        scores = probabilities.amax(dim=(2, 3)) if reduce == "max" else probabilities.sum(dim=(2, 3))
    else:  # in place, and one exponential a column for "max": no second array of rows x columns
        norm = lse.reshape(batch, kv_heads, group, count, 1).masked_fill(~live[:, None, None, :, None], 0.0)
        logits.sub_(norm if weights is None else norm - weights.log()[:, None])
        scores = logits.amax(dim=(2, 3)).exp_() if reduce == "max" else logits.exp_().sum(dim=(2, 3))
    if reduce == "mean":
        scores = scores / (group * live.sum(1).clamp(min=1))[:, None, None]
    return scores.masked_fill((column >= (lengths - window)[:, None])[:, None], 0.0)


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
        storage = states.new_zeros(batch, kv_heads, budget + room, dim)
        kept = states.gather(2, index.expand(-1, -1, -1, dim)).masked_fill(unused, 0)
        storage[:, :, :budget] = kept
        return storage.view(batch, kv_heads * (budget + room), dim)

    return compact(key), compact(value), (positions >= 0).sum(-1)


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
) -> Tensor:
    """Budgeted attention of q new queries; the GQA group is folded into the query length.

    Args: query [B, H, q, D]; keys [B, K, P, D], values [B, K, P, Dv]; lengths [B, K] with the q new slots counted;
    softcap, sinks: as `modified_attention`.
    Returns: [B, H, q, Dv]; query i reads the slots below lengths - (q - 1 - i).
    """
    batch, heads, count, dim = query.shape
    group = heads // keys.shape[1]
    mask = slots_read(lengths, count, keys.shape[2], group)
    if softcap or sinks is not None:
        return modified_attention(query, keys, values, mask.unflatten(2, (-1, count)), scale, softcap, sinks)
    folded = query.reshape(batch, keys.shape[1], group * count, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, values.shape[3])


def slots_read(lengths: Tensor, count: int, slots: int, group: int) -> Tensor:
    """Mask [B, K, 1 or G * q, P] of `attend`: which of P slots each of q queries reads."""
    limit = lengths[:, :, None] - torch.arange(count - 1, -1, -1, device=lengths.device)  # [B, K, q]
    mask = torch.arange(slots, device=lengths.device) < limit[..., None]  # [B, K, q, P]
    if count > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(*lengths.shape, group * count, slots)
    return mask


def soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), as Gemma 2 has it (arXiv 2408.00118); 0 caps nothing."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 over the last axis and, where there are sinks, one logit more that belongs to no key.

    Args: logits [..., M, T]; sinks, broadcast to [..., M]: each row's further logit (gpt-oss, arXiv 2508.10925).
    """
    if sinks is None:
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    column = sinks.to(logits.dtype).expand(logits.shape[:-1])[..., None]
    return torch.softmax(torch.cat([logits, column], -1), dim=-1, dtype=torch.float32)[..., :-1]


def modified_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention whose logits are soft-capped, or whose softmax has a sink: what eager models compute.

    Args: query [B, H, q, D]; key [B, K, T, D], value [B, K, T, Dv]; mask: True where a query reads, or added to the
    logits, broadcast to [B, H, q, T] or [B, K, G, q, T]; softcap: 0 for none; sinks [H] natural logits.
    Returns: [B, H, q, Dv].
    """
    batch, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * count, dim)
    logits = soft_capped(torch.matmul(folded, key.transpose(2, 3)) * scale, softcap)
    logits = logits.view(batch, kv_heads, group, count, key.shape[2])
    if mask is not None:
        if mask.dim() == 4:
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, group))
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = softmax_with_sinks(logits, None if sinks is None else sinks.view(kv_heads, group, 1))
    out = torch.matmul(weights.to(value.dtype).flatten(2, 3), value)
    return out.view(batch, heads, count, value.shape[3])


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
) -> Tensor:
    """`append_kv` of one token, then `attend`: [B, H, 1, Dv].

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], changed in place; query [B, H, 1, D];
    key [B, K, 1, D], value [B, K, 1, Dv].
    """
    append_kv(keys, values, lengths, key, value)
    keys, values = (states.unflatten(1, (key.shape[1], -1)) for states in (keys, values))
    return attend(query, keys, values, lengths, scale, softcap, sinks)
