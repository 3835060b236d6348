"""What models do to attention, in torch: the references share it. What kernels splice in is in logits.py.

Symbols: B batch, H query heads, K key/value heads, G = H / K, D and Dv head dimensions, q queries, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def first_read(last: Tensor, sliding: int, chunk: int) -> Tensor:
    """First position that a query reads whose own, or last, is `last`; any shape. sliding, chunk: as in the dialect."""
    if sliding:
        return (last - sliding + 1).clamp(min=0)
    return last // chunk * chunk if chunk else torch.zeros_like(last)


def visible(rows: Tensor, columns: int, lengths: Tensor, lookahead: int, sliding: int, chunk: int) -> Tensor:
    """[B, R, T] bool: which columns the rows at columns [B, R] read; sliding, chunk: as in the dialect.

    Futures of `lookahead` tokens stand behind prompts of `lengths` [B], and none sees the others.
    """
    (branch, position), (own, last) = (
        placed(at, lengths[:, None], lookahead) for at in (torch.arange(columns, device=rows.device)[None], rows)
    )
    branch, position, own, last = branch[:, None], position[:, None], own[:, :, None], last[:, :, None]
    return ((branch < 0) | (branch == own)) & (position <= last) & (position >= first_read(last, sliding, chunk))


def placed(at: Tensor, lengths: Tensor, lookahead: int) -> tuple[Tensor, Tensor]:
    """The future that stands in columns `at`, -1 for the prompt's, and their positions."""
    behind = at - lengths
    branch = torch.where(behind < 0, -1, behind // lookahead)
    return branch, torch.where(behind < 0, at, lengths + behind % lookahead)


def biased(allowed: Tensor, bias: Tensor) -> Tensor:
    """What is added to logits, in float32: a bias of the keys where a query reads them, -inf elsewhere.

    Args: allowed: bool [.., q, T]; bias: broadcast to [.., q, T].
    """
    return torch.where(allowed, bias.float(), float("-inf"))


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
