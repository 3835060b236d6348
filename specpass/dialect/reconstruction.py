"""Scores by what a row's output loses without a column."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class Reconstruction(
    Operator,
    schema="reconstruction(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor lengths, int window, "
    "float scale, str reduce, int lookahead=0, float softcap=0.0, Tensor? sinks=None, Tensor? bias=None) -> Tensor",
    since="PRUNED",
):
    """[B, K, T] float32: how far what the query rows read would move without each column, reduced over a KV head's
    rows. Source: ReST-KV, arXiv 2605.08840.
    """

    query: fx.Node  # [B, H, R, D]
    key: fx.Node  # [B, K, T, D]
    value: fx.Node  # [B, K, T, Dv]
    rows: fx.Node  # [B, R]
    lengths: fx.Node  # [B]
    window: int
    scale: float
    reduce: str
    lookahead: int  # tokens of each future, none of which sees the others; 0: there is one at most
    softcap: float
    sinks: fx.Node | None  # [H]
    bias: fx.Node | None  # [B or 1, H, T]

    @staticmethod
    def fake(query, key, *rest):
        return key.new_empty(key.shape[:3], dtype=torch.float32)
