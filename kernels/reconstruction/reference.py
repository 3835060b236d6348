"""reconstruction in plain aten: readable, exact, any device.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, R query rows that score, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.kernels.attention import softmax_with_sinks, visible
from specpass.kernels.importance.reference import row_logits

ROUNDING = 1e-6  # of 1 - p in float32


def reconstruction(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    lookahead: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """How far a row's output o = sum p v moves where one column goes and the others share its attention.

    That is p / (1 - p) |v - o| (ReST-KV, arXiv 2605.08840, without its smoothing), and p (|v| + max |v|) at most, by
    which rounding is bounded where p is all but 1.

    Args: query [B, H, R, D]; key [B, K, T, D]; value [B, K, T, Dv]; rows [B, R] positions (-1: left out); lengths [B]
    prompt lengths; reduce "max" or "mean", over the rows of a KV head; lookahead: tokens of each future, where several
    stand behind a prompt, none of which sees the others; softcap, sinks, bias: as `importance`.
    Returns: scores [B, K, T] float32; columns outside [0, lengths - W) are 0.
    """
    kv_heads, columns = key.shape[1:3]
    group = query.shape[1] // kv_heads
    column, live = torch.arange(columns, device=key.device), (rows >= 0)[:, None, None, :, None]
    seen = visible(rows.clamp(min=0), columns, lengths, lookahead, 0, 0) if lookahead else column <= rows[:, :, None]
    seen, scores = seen[:, None, None], []
    for head in range(kv_heads):  # one at a time: what follows is [B, 1, G, R, T] in float32
        asked = slice(head * group, (head + 1) * group)
        own = None if bias is None else bias[:, asked]
        logits = row_logits(query[:, asked], key[:, head, None], scale, softcap, own)
        logits = torch.where(seen, logits, float("-inf"))
        p = softmax_with_sinks(logits, None if sinks is None else sinks[asked, None])
        p = torch.where(live, p, 0.0)
        states = value[:, head, None, None].float()  # [B, 1, 1, T, Dv]
        out = torch.matmul(p, states)
        square = states.square().sum(-1)[:, :, :, None]  # [B, 1, 1, 1, T]
        far = square + out.square().sum(-1, keepdim=True) - 2 * torch.matmul(out, states.transpose(3, 4))
        moved = p / (1 - p).clamp(min=ROUNDING) * far.clamp(min=0.0).sqrt()
        norm = square.sqrt()
        moved = torch.minimum(moved, p * (norm + norm.amax(-1, keepdim=True)))
        scores.append(moved.amax((2, 3)) if reduce == "max" else moved.sum((2, 3)))
    found = torch.cat(scores, 1)
    if reduce == "mean":
        found = found / (group * (rows >= 0).sum(1).clamp(min=1))[:, None, None]
    return torch.where((column < (lengths - window)[:, None])[:, None], found, 0.0)
