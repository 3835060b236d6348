"""gather_kv in plain aten: readable, exact, any device.

Symbols: B batch, K key/value heads, T columns, D and Dv head dimensions, C budget, N room for generated tokens.
"""

from __future__ import annotations

from torch import Tensor


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
        kept = states.gather(2, index.expand(-1, -1, -1, dim)).masked_fill(unused, 0)
        storage = states.new_zeros(batch, kv_heads * (budget + room), dim)  # no view: decode has a graph for each kind
        storage.view(batch, kv_heads, budget + room, dim)[:, :, :budget] = kept
        return storage

    return compact(key), compact(value), (positions >= 0).sum(-1)
