"""Attention of a prompt that reads a part of it, in plain aten: readable, exact, any device.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions, V chosen columns, W window,
L lookahead.
Formula: arXiv 2506.08373, "sparse prefill".
"""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.kernels.cpu.wide import sdpa

ROWS = 256  # query rows whose logits are held at once


def prefill_attention_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    ahead: int,
    recent: int,
) -> Tensor:
    """Causal attention where a query reads its KV head's `columns` and its own last `recent` positions.

    Args: query [B, H, T, D], key [B, K, T, D], value [B, K, T, Dv]; columns [B, K, V], ascending, -1 unused and last;
    lengths [B] of the prompts; window, ahead: the last W queries of a prompt and the L behind it read all.
    Returns: [B, H, T, Dv], lying in memory as [B, T, H, Dv]; what stands behind a row's lookahead is nobody's.
    """
    chosen = read_whole(columns, lengths, ahead, recent)
    out = in_blocks(query, key, value, chosen, scale, recent)
    rows = (lengths[:, None] + torch.arange(-window, ahead, device=lengths.device)).clamp(min=0)
    return read_all(query, key, value, rows, scale, out)


def read_whole(columns: Tensor, lengths: Tensor, ahead: int, recent: int) -> Tensor:
    """`columns` [B, K, V], the first V of them where a prompt is so short that these and the last ones are all."""
    width = columns.shape[2]
    short = (lengths + ahead <= width + recent)[:, None, None]
    return torch.where(short, torch.arange(width, device=columns.device), columns)


def in_blocks(query: Tensor, key: Tensor, value: Tensor, columns: Tensor, scale: float, recent: int) -> Tensor:
    """ROWS queries at a time over the chosen columns and the last `recent` ones, the group folded into their rows."""
    batch, heads, count = query.shape[:3]
    kv_heads = key.shape[1]
    out = query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)
    index = columns.clamp(min=0, max=count - 1)[..., None]
    chosen = [states.gather(2, index.expand(-1, -1, -1, states.shape[3])) for states in (key, value)]
    column = torch.arange(count, device=query.device)
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        row, seen = column[rows, None], slice(max(start - recent + 1, 0), rows.stop)
        near = (column[seen] <= row) & (column[seen] > row - recent)
        far = ((columns >= 0)[:, :, None]) & (columns[:, :, None] <= row - recent)
        mask = torch.cat([far, near.expand(batch, kv_heads, -1, -1)], 3)[:, :, None]
        mask = mask.expand(-1, -1, heads // kv_heads, -1, -1).flatten(2, 3)
        keys, values = (
            torch.cat([taken, states[:, :, seen]], 2) for taken, states in zip(chosen, (key, value), strict=True)
        )
        folded = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3)
        found = sdpa(folded, keys, values, attn_mask=mask, scale=scale)
        out[:, :, rows] = found.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
    return out


def read_all(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float, out: Tensor) -> Tensor:
    """`out` [B, H, T, Dv] with the queries of rows [B, R] over all columns up to their own; written in place."""
    heads, kv_heads = query.shape[1], key.shape[1]
    index = rows[:, None, :, None].expand(-1, heads, -1, -1)
    taken = query.gather(2, index.expand(-1, -1, -1, query.shape[3]))
    mask = (torch.arange(key.shape[2], device=key.device) <= rows[:, :, None])[:, None]
    folded = taken.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    mask = mask.repeat(1, 1, heads // kv_heads, 1)
    found = sdpa(folded, key, value, attn_mask=mask, scale=scale)
    found = found.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
    return out.scatter_(2, index.expand(-1, -1, -1, value.shape[3]), found)
