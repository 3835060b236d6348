"""Several futures behind one prompt: attention of rows that share a prompt and do not see each other."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.attention import rows_in_place
from specpass.dialect.define import Operator


class AttendBranches(
    Operator,
    schema="attend_branches(Tensor attention, Tensor query, Tensor key, Tensor value, Tensor lengths, int window, "
    "int lookahead, int futures, float scale, float softcap=0.0, Tensor? sinks=None, int sliding=0, int chunk=0) "
    "-> (Tensor, Tensor)",
    since="PRUNED",
):
    """Causal attention [B, H, T, Dv] in which row b's M futures, side by side behind its prompt, do not see each other.

    And the natural log-sum-exp [B, H, W + M L] float32 of the prompt's last W rows and those of all futures.
    """

    attention: fx.Node  # [B, H, T, Dv] of prefill_attention, right but for the rows of all futures but the first
    query: fx.Node  # [B, H, T, D]
    key: fx.Node  # [B, K, T, D]
    value: fx.Node  # [B, K, T, Dv]
    lengths: fx.Node  # [B]
    window: int
    lookahead: int
    futures: int
    scale: float
    softcap: float
    sinks: fx.Node | None  # [H]
    sliding: int
    chunk: int

    @staticmethod
    def fake(attention, query, key, value, lengths, window, lookahead, futures, *rest):
        rows = window + lookahead * futures
        lse = query.new_empty(query.shape[0], query.shape[1], rows, dtype=torch.float32)
        return rows_in_place(query, value), lse
