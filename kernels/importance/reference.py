"""importance in plain aten: readable, exact, any device.

Symbols: B batch, S prompt length, L lookahead, T = S + L columns, H query heads, K key/value heads, G = H / K,
D head dimension, W window, R query rows that score.
Rows are packed: row b's tokens stand at 0 .. lengths[b] - 1, whatever padding the caller had.
Formulas: arXiv 2506.08373; SnapKV (2404.14469).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.kernels.attention import soft_capped, softmax_with_sinks


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
    bias: Tensor | None = None,
) -> Tensor:
    """Attention probability that each prompt column gets from the query rows, reduced over the rows of a KV head.

    Args: query [B, H, R, D]; key [B, K, T, D]; rows [B, R] positions (-1: left out); lengths [B] prompt lengths;
    reduce "max", "mean" or "sum"; weights [R] float32 >= 0 of the rows, or None; lse [B, H, R] float32: the rows'
    natural log-sum-exp over the columns that they see, where `prefill_attention_lse` found it already; softcap, sinks:
    as `modified_attention`; bias [B or 1, H, T]: added to the logits of each column.
    Returns: scores [B, K, T] float32; columns outside [0, lengths - W) are 0.
    """
    (batch, kv_heads, columns, _), count = key.shape, query.shape[2]
    group = query.shape[1] // kv_heads
    column = torch.arange(columns, device=key.device)
    hidden = (column > rows[:, :, None])[:, None, None]  # [B, 1, 1, R, T]
    logits = row_logits(query, key, scale, softcap, bias)
    logits.masked_fill_(hidden, float("-inf"))
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


def row_logits(query: Tensor, key: Tensor, scale: float, softcap: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """[B, K, G, R, T] float32 of query [B, H, R, D] and key [B, K, T, D], which is never repeated to H heads."""
    folded = query.unflatten(1, (key.shape[1], -1))
    logits = torch.matmul(folded.flatten(2, 3).float(), key.float().transpose(2, 3)) * scale
    logits = soft_capped(logits, softcap).unflatten(2, folded.shape[2:4])
    return logits if bias is None else logits + bias.float().unflatten(1, folded.shape[1:3])[:, :, :, None]
