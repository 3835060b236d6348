"""Attention of a prompt that reads a part of it, in aten, by the CPU's own library, and as ONNX says it.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions, V chosen columns, W window.
Formula: arXiv 2506.08373, "sparse prefill".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specpass.dialect import sparse as dialect
from specpass.kernels.attention import modified_attention
from specpass.kernels.cpu import prefill
from specpass.kernels.sparse import reference
from specpass.ops.attention import attention_flops, prefill_attention
from specpass.ops.bind import bind


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
    if query.shape[2] <= columns.shape[2] + recent:
        return prefill_attention(query, key, value, scale)
    if prefill.refuse(query, key, value, scale) is None:
        exact = torch.stack([(lengths - window).clamp(min=0), lengths + ahead], 1)
        sparse = prefill.Sparse(reference.read_whole(columns, lengths, ahead, recent), exact)
        return prefill.prefill(query, key, value, scale, recent, sparse)[0]
    return reference.prefill_attention_sparse(query, key, value, columns, lengths, scale, window, ahead, recent)


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
