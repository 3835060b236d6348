"""Attention of several futures behind one prompt, in plain aten.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, W window, L lookahead, M futures, R = W + M L rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.dialect import branches as dialect
from specpass.kernels.attention import soft_capped, visible
from specpass.ops.bind import bind


def attend_branches(
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    window: int,
    lookahead: int,
    futures: int,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention in which each future sees the prompt and itself, and the log-sum-exp of the rows that score.

    Row b's futures stand at lengths[b] + m L .. + L - 1. What the first one sees is causal already.

    Args: attention [B, H, T, Dv], causal; query [B, H, T, D]; key [B, K, T, D]; value [B, K, T, Dv]; lengths [B];
    softcap, sinks, sliding, chunk: as in `prefill_attention`.
    Returns: attention with the rows of all futures but the first anew, [B, H, T, Dv] lying as [B, T, H, Dv]; lse
    [B, H, R] float32.
    """
    heads, kv_heads, columns = query.shape[1], key.shape[1], query.shape[2]
    rows = (lengths[:, None] + torch.arange(-window, lookahead * futures, device=query.device)).clamp(min=0)
    seen = visible(rows, columns, lengths, lookahead, sliding, chunk)[:, None]
    taken = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, query.shape[3]))
    grouped, first = taken.unflatten(1, (kv_heads, heads // kv_heads)), window + lookahead
    outs, sums = [], []
    for head in range(kv_heads):  # one at a time: logits are [B, G, R, T] in float32
        logits = torch.matmul(grouped[:, head].float(), key[:, head, None].float().transpose(2, 3)) * scale
        logits = soft_capped(logits, softcap).masked_fill(torch.logical_not(seen), float("-inf"))
        lse = torch.logsumexp(logits, -1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.view(kv_heads, -1)[head, :, None].float())
        weights = torch.exp(logits[:, :, first:] - lse[:, :, first:, None])
        outs.append(torch.matmul(weights.to(value.dtype), value[:, head, None]))
        sums.append(lse)
    own = torch.cat(outs, 1).transpose(1, 2).to(attention.dtype)  # [B, (M - 1) L, H, Dv]
    index = rows[:, first:, None, None].expand(-1, -1, *own.shape[2:])
    return attention.transpose(1, 2).scatter(1, index, own).transpose(1, 2), torch.cat(sums, 1)


def attend_branches_flops(
    _attention: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    _lengths: torch.Size,
    window: int,
    lookahead: int,
    futures: int,
    *_: object,
    **__: object,
) -> int:
    """Logits of all W + M L rows, and values of the (M - 1) L that are attended anew."""
    batch, heads, _, dim = query
    logits = (window + lookahead * futures) * dim
    return 2 * batch * heads * key[2] * (logits + lookahead * (futures - 1) * value[3])


bind(dialect.AttendBranches, attend_branches, flops=attend_branches_flops)
