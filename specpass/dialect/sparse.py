"""Attention of a prompt that reads a part of it ("vertical and slash")."""

from __future__ import annotations

from torch import fx

from specpass.dialect.attention import rows_in_place
from specpass.dialect.define import Operator


class PrefillAttentionSparse(
    Operator,
    schema="prefill_attention_sparse(Tensor query, Tensor key, Tensor value, Tensor columns, Tensor lengths, "
    "float scale, int window, int ahead, int recent) -> Tensor",
    since="PRUNED",
):
    """prefill_attention where a query reads its last `recent` positions and its KV head's `columns` in front of them.

    The last W queries of a prompt and the L behind it, which score, read all; so does a row of at most V + recent
    tokens, `ahead` included.
    """

    query: fx.Node  # [B, H, T, D]
    key: fx.Node  # [B, K, T, D]
    value: fx.Node  # [B, K, T, Dv]
    columns: fx.Node  # [B, K, V], ascending, -1 unused
    lengths: fx.Node  # [B]
    scale: float
    window: int
    ahead: int
    recent: int

    @staticmethod
    def fake(query, key, value, *rest):
        return rows_in_place(query, value)
