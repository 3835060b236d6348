"""The positions of keys, and what ALiBi adds to their logits, in plain aten.

Symbols: B batch, H query heads, K KV heads, T columns, C budget, P slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import alibi as dialect
from specpass.ops.bind import bind


def key_columns(key: Tensor) -> Tensor:
    """[1, 1, T] of key [B, K, T, D]."""
    return torch.arange(key.shape[2], device=key.device)[None, None]


def slot_positions(positions: Tensor, keys: Tensor) -> Tensor:
    """[B, K, P] of keys [B, K, P, D], from the prompt's positions [B, K, C].

    A row's last position is kept by one of its heads at least: what is generated stands right behind it.
    """
    slot = torch.arange(keys.shape[2], device=positions.device)
    used = (positions >= 0).sum(2, keepdim=True)
    last = positions.amax((1, 2), keepdim=True)
    wide = F.pad(positions, (0, keys.shape[2] - positions.shape[2]))
    return torch.where(slot < used, wide, last + 1 + slot - used)


def key_bias(slopes: Tensor, positions: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """[B or 1, H, T]; see the operator. Bloom multiplies in float32 and rounds, Falcon multiplies in bfloat16."""
    slopes = slopes.reshape(-1)
    own = positions.repeat_interleave(slopes.shape[0] // positions.shape[1], 1)  # [B or 1, H, T]
    return (slopes[:, None] * own).to(dtype) * factor


def key_bias_onnx(slopes: Tensor, positions: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """As the reference, rounding as torch does: ONNX Runtime multiplies no numbers of bfloat16 on a CPU."""
    kind, slopes = slopes.dtype, slopes.reshape(-1).float()
    own = positions.repeat_interleave(slopes.shape[0] // positions.shape[1], 1).float().to(kind).float()
    return (slopes[:, None] * own).to(kind).to(dtype) * factor


bind(dialect.KeyColumns, key_columns)
bind(dialect.SlotPositions, slot_positions)
bind(dialect.KeyBias, key_bias, onnx=key_bias_onnx)
