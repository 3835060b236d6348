"""Attention as rewritten graphs say it.

Where a layer reads a part of what is in front of a query: `sliding` V is the last V positions, itself included, and
`chunk` V those of its own chunk of V positions. 0 is no such bound.
`bias` [B or 1, H, T] is added to the logits of each key, for all queries alike (ALiBi: see alibi.py).
"""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class ModifiedAttention(
    Operator,
    schema="modified_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, "
    "Tensor? sinks) -> Tensor",
    until="DRAFTED",
):
    """Attention whose logits are soft-capped, or whose softmax has sinks, in the model's own spelling: with a mask."""

    query: fx.Node  # [B, H, q, D]
    key: fx.Node  # [B, K, T, D]
    value: fx.Node  # [B, K, T, Dv]
    mask: fx.Node | None
    scale: float
    softcap: float
    sinks: fx.Node | None  # [H]

    @staticmethod
    def fake(query, key, value, *rest):
        return query.new_empty(*query.shape[:3], value.shape[3])


class PrefillAttention(
    Operator,
    schema="prefill_attention(Tensor query, Tensor key, Tensor value, float scale, float softcap=0.0, "
    "Tensor? sinks=None, int sliding=0, int chunk=0, Tensor? bias=None) -> Tensor",
):
    """Causal attention of packed rows, without a mask: [B, H, T, Dv], lying in memory as [B, T, H, Dv]."""

    query: fx.Node  # [B, H, T, D]
    key: fx.Node  # [B, K, T, D]
    value: fx.Node  # [B, K, T, Dv]
    scale: float
    softcap: float
    sinks: fx.Node | None  # [H]
    sliding: int
    chunk: int
    bias: fx.Node | None  # [B or 1, H, T]

    @staticmethod
    def fake(query, key, value, *rest):
        return rows_in_place(query, value)


class PrefillAttentionLse(
    Operator,
    schema="prefill_attention_lse(Tensor query, Tensor key, Tensor value, Tensor rows, float scale) "
    "-> (Tensor, Tensor)",
    since="LOWERED",
):
    """prefill_attention, and the natural log-sum-exp [B, H, R] float32 of the rows that score."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    rows: fx.Node  # [B, R]
    scale: float

    @staticmethod
    def fake(query, key, value, rows, scale):
        lse = query.new_empty(query.shape[0], query.shape[1], rows.shape[1], dtype=torch.float32)
        return rows_in_place(query, value), lse


class Attend(
    Operator,
    schema="attend(Tensor query, Tensor keys, Tensor values, Tensor lengths, float scale, float softcap=0.0, "
    "Tensor? sinks=None, int sliding=0, int chunk=0, Tensor? bias=None, Tensor? offsets=None, int layers=1, "
    "Tensor[]? quantized=None, int bits=0) -> Tensor",
    since="PRUNED",
):
    """q new queries over the slots in use, whose number `lengths` says: [B, H, q, Dv].

    With `offsets` heads have budgets of their own: keys are [B, T, D], and head k's slots start at offsets[b, k]. The
    heads of so many `layers` lie in them.

    With `quantized` (codes, counts and basis of QuantizeKv) a prompt in so many `bits` stands in front of the slots.
    """

    query: fx.Node  # [B, H, q, D]
    keys: fx.Node  # [B, K, P, D], or [B, T, D]
    values: fx.Node  # [B, K, P, Dv], or [B, T, Dv]
    lengths: fx.Node  # [B, K]
    scale: float
    softcap: float
    sinks: fx.Node | None
    sliding: int
    chunk: int
    bias: fx.Node | None  # [B or 1, H, P]
    offsets: fx.Node | None  # [B, K]
    layers: int
    quantized: list[fx.Node] | None
    bits: int

    @staticmethod
    def fake(query, keys, values, *rest):
        return query.new_empty(*query.shape[:3], values.shape[-1])


class AppendAttend(
    Operator,
    schema="append_attend(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor query, Tensor key, "
    "Tensor value, float scale, float softcap=0.0, Tensor? sinks=None, int sliding=0, int chunk=0, "
    "Tensor? offsets=None, int layers=1) -> Tensor",
    since="LOWERED",
):
    """append_kv, then attend: [B, H, q, Dv]."""

    keys: fx.Node  # [B, K * P, D]
    values: fx.Node  # [B, K * P, Dv]
    lengths: fx.Node  # [B, K]
    query: fx.Node  # [B, H, q, D]
    key: fx.Node  # [B, K, q, D]
    value: fx.Node
    scale: float
    softcap: float
    sinks: fx.Node | None
    sliding: int
    chunk: int
    offsets: fx.Node | None  # [B, K], as in attend
    layers: int

    @staticmethod
    def fake(keys, values, lengths, query, key, value, *rest):
        return query.new_empty(*query.shape[:3], value.shape[3])


class AppendAttendLse(
    Operator,
    schema="append_attend_lse(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor query, Tensor key, "
    "Tensor value, float scale) -> (Tensor, Tensor)",
    since="LOWERED",
):
    """append_attend, and the natural log-sum-exp [B, H, 1] float32 of the new token's row over the slots in use."""

    keys: fx.Node  # [B, K * P, D]
    values: fx.Node  # [B, K * P, Dv]
    lengths: fx.Node  # [B, K]
    query: fx.Node  # [B, H, 1, D]
    key: fx.Node  # [B, K, 1, D]
    value: fx.Node
    scale: float

    @staticmethod
    def fake(keys, values, lengths, query, key, value, scale):
        return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def rows_in_place(query, value):
    """[B, H, T, Dv] in the memory format of [B, T, H, Dv], which o_proj reads in place."""
    batch, heads, columns, _ = query.shape
    return query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
