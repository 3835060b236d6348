"""Prompt compression (SpecPC): scores of prompt tokens, the tokens that the target reads, and two ways to count."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class RowWeights(Operator, schema="row_weights(Tensor lengths, int window) -> Tensor", since="PRUNED"):
    """[W] float32: linspace(0, 1, W)."""

    lengths: fx.Node
    window: int

    @staticmethod
    def fake(lengths, window):
        return lengths.new_empty(window, dtype=torch.float32)


class NoScores(Operator, schema="no_scores(Tensor like, int kv_heads) -> Tensor", since="PRUNED"):
    """[B, T] zeros to start a reduction with, from like [B, K * T, ...]."""

    like: fx.Node
    kv_heads: int

    @staticmethod
    def fake(like, kv_heads):
        return like.new_empty(like.shape[0], like.shape[1] // kv_heads, dtype=torch.float32)


class MergeLayer(Operator, schema="merge_layer(Tensor total, Tensor scores, str reduce) -> Tensor", since="PRUNED"):
    """[B, T] with one layer's scores [B, K, T]."""

    total: fx.Node
    scores: fx.Node
    reduce: str

    @staticmethod
    def fake(total, scores, reduce):
        return torch.empty_like(total)


class MergeStep(Operator, schema="merge_step(Tensor total, Tensor scores, str reduce) -> Tensor", since="DRAFTED"):
    """[B, S] with the prompt's columns of one decode step's scores [B, P]."""

    total: fx.Node
    scores: fx.Node
    reduce: str

    @staticmethod
    def fake(total, scores, reduce):
        return torch.empty_like(total)


class SelectPrompt(
    Operator,
    schema="select_prompt(Tensor scores, Tensor lengths, int budget, int window, int kernel, int neighbours, "
    "str pool) -> Tensor",
    since="DRAFTED",
):
    """[B, C] prompt tokens to read, ascending; unused slots -1."""

    scores: fx.Node  # [B, S]
    lengths: fx.Node  # [B]
    budget: int
    window: int
    kernel: int
    neighbours: int
    pool: str

    @staticmethod
    def fake(scores, lengths, budget, *rest):
        return lengths.new_empty(lengths.shape[0], budget)


class TakeIds(Operator, schema="take_ids(Tensor ids, Tensor positions) -> Tensor", since="DRAFTED"):
    """[B, S] ids at positions [B, C] -> [B, C]."""

    ids: fx.Node
    positions: fx.Node

    @staticmethod
    def fake(ids, positions):
        return ids.new_empty(positions.shape)


class CountKept(Operator, schema="count_kept(Tensor positions) -> Tensor", since="DRAFTED"):
    """[B] int64: used slots of positions [B, C]."""

    positions: fx.Node

    @staticmethod
    def fake(positions):
        return positions.new_empty(positions.shape[0])


class NumberAnew(Operator, schema="number_anew(Tensor positions) -> Tensor", since="DRAFTED"):
    """[B, C]: 0 .. C - 1."""

    positions: fx.Node

    @staticmethod
    def fake(positions):
        return torch.empty_like(positions)


class ToldPositions(Operator, schema="told_positions(Tensor position_ids, Tensor shift) -> Tensor", since="PRUNED"):
    """[B or 1, q] as the caller counts -> [B, q] as the target was told, shift [B] less."""

    position_ids: fx.Node
    shift: fx.Node

    @staticmethod
    def fake(position_ids, shift):
        return position_ids.new_empty(shift.shape[0], position_ids.shape[1])


class ToldLength(Operator, schema="told_length(Tensor seen, Tensor shift) -> Tensor", since="PRUNED"):
    """The same for the cache's 0-d length."""

    seen: fx.Node
    shift: fx.Node

    @staticmethod
    def fake(seen, shift):
        return seen.new_empty(())
