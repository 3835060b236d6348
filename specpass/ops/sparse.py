"""Attention of a prompt that reads a part of it, in aten, by the CPU's own library, and as ONNX says it.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions, V chosen columns, W window.
Formula: arXiv 2506.08373, "sparse prefill".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import sparse as dialect
from specpass.kernels.attention import modified_attention
from specpass.kernels.cpu import prefill
from specpass.ops.attention import attention_flops, prefill_attention
from specpass.ops.bind import bind

ROWS = 256  # query rows whose logits are held at once in aten


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
    """[B, H, T, Dv] of query [B, H, T, D], key [B, K, T, D], value [B, K, T, Dv], columns [B, K, V], lengths [B]."""
    width = columns.shape[2]
    if query.shape[2] <= width + recent:
        return prefill_attention(query, key, value, scale)
    # A row that is short enough to be read whole: its first V columns, and the last `recent`, are all of them.
    short = (lengths + ahead <= width + recent)[:, None, None]
    columns = torch.where(short, torch.arange(width, device=columns.device), columns)
    if prefill.refuse(query, key, value, scale) is None:
        exact = torch.stack([(lengths - window).clamp(min=0), lengths + ahead], 1)
        return prefill.prefill(query, key, value, scale, recent, prefill.Sparse(columns, exact))[0]
    out = in_blocks(query, key, value, columns, scale, recent)
    rows = (lengths[:, None] + torch.arange(-window, ahead, device=lengths.device)).clamp(min=0)
    return read_all(query, key, value, rows, scale, out)


def in_blocks(query: Tensor, key: Tensor, value: Tensor, columns: Tensor, scale: float, recent: int) -> Tensor:
    """ROWS queries at a time over the chosen columns and the last `recent` ones, the group folded into their rows."""
    batch, heads, count = query.shape[:3]
    kv_heads = key.shape[1]
    out = query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)
    index = columns.clamp(min=0)[..., None]
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
        found = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
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
    found = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    found = found.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
    return out.scatter_(2, index.expand(-1, -1, -1, value.shape[3]), found)


def prefill_attention_sparse_onnx(
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
    """By the definition: one mask [B, K, T, T]."""
    count, width = key.shape[2], columns.shape[2]
    column = torch.arange(count, device=key.device)
    row = column[:, None]
    spread = torch.zeros(*columns.shape[:2], count + 1, device=key.device)
    chosen = spread.scatter(2, torch.where(columns < 0, count, columns), 1.0)[:, :, None, :count] > 0
    whole = (lengths + ahead <= width + recent)[:, None, None, None]
    scoring = (column >= (lengths - window)[:, None]) & (column < (lengths + ahead)[:, None])  # [B, q]
    allowed = (column <= row) & (whole | scoring[:, None, :, None] | chosen | (column > row - recent))
    return modified_attention(query, key, value, allowed[:, :, None], scale, 0.0, None)


def sparse_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    columns: torch.Size,
    lengths: torch.Size,
    scale: float,
    window: int,
    ahead: int,
    recent: int,
    **_: Any,
) -> int:
    """As attention over V + `recent` columns, or all where they are fewer."""
    batch, heads, dim = key[0], key[1], key[3]
    read = min(key[2], columns[2] + recent)
    return attention_flops(query, (batch, heads, read, dim), value)


bind(dialect.PrefillAttentionSparse, prefill_attention_sparse, onnx=prefill_attention_sparse_onnx, flops=sparse_flops)
