"""Rows of a batch: packing, appending, taking. Row b's real tokens stand at 0 .. lengths[b] - 1."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class PackOrder(Operator, schema="pack_order(Tensor attention_mask, Tensor ids) -> (Tensor, Tensor)"):
    """order [B, S]: packed column -> the caller's column, real tokens first; lengths [B]."""

    attention_mask: fx.Node  # [B, S]
    ids: fx.Node  # [B, S] or [B, S, E], of which the shape is read

    @staticmethod
    def fake(attention_mask, ids):
        return ids.new_empty(ids.shape[:2], dtype=torch.int64), ids.new_empty(ids.shape[0], dtype=torch.int64)


class PackAppended(
    Operator, schema="pack_appended(Tensor attention_mask, Tensor tokens) -> (Tensor, Tensor, Tensor)", since="PRUNED"
):
    """Of q appended tokens: order [B, q] packed -> the caller's, place [B, q] its inverse, masked tokens [B]."""

    attention_mask: fx.Node  # [B, M], whose last q columns are those of the tokens
    tokens: fx.Node  # [B, q] ids or [B, q, E] embeddings, of which the shape is read

    @staticmethod
    def fake(attention_mask, tokens):
        order = tokens.new_empty(tokens.shape[:2], dtype=torch.int64)
        return order, torch.empty_like(order), order.new_empty(order.shape[0])


class FullLengths(Operator, schema="full_lengths(Tensor ids) -> Tensor"):
    """[B]: S for every row."""

    ids: fx.Node

    @staticmethod
    def fake(ids):
        return ids.new_empty(ids.shape[0], dtype=torch.int64)


class PackIds(Operator, schema="pack_ids(Tensor ids, Tensor order) -> Tensor"):
    """[B, S] with the real tokens first."""

    ids: fx.Node
    order: fx.Node

    @staticmethod
    def fake(ids, order):
        return ids.new_empty(order.shape)


class ExpandRows(Operator, schema="expand_rows(Tensor ids, Tensor like) -> Tensor"):
    """[1 or B, S] -> [B, S], dense."""

    ids: fx.Node
    like: fx.Node

    @staticmethod
    def fake(ids, like):
        return ids.new_empty(like.shape[0], ids.shape[1])


class AppendIds(Operator, schema="append_ids(Tensor ids, Tensor extra, Tensor lengths) -> Tensor", since="DRAFTED"):
    """[B, S + L]: row b's `extra` [B, L] stands right behind its lengths[b] tokens."""

    ids: fx.Node
    extra: fx.Node
    lengths: fx.Node

    @staticmethod
    def fake(ids, extra, lengths):
        return ids.new_empty(ids.shape[0], ids.shape[1] + extra.shape[1])


class AppendPositions(
    Operator,
    schema="append_positions(Tensor positions, Tensor lengths, int length, int futures=1) -> Tensor",
    since="DRAFTED",
):
    """[B or 1, S] -> [B, S + M L]: each of M futures goes on counting from each row's last token."""

    positions: fx.Node
    lengths: fx.Node
    length: int
    futures: int

    @staticmethod
    def fake(positions, lengths, length, futures=1):
        return positions.new_empty(lengths.shape[0], positions.shape[1] + length * futures)


class RowIndex(Operator, schema="row_index(Tensor ids) -> Tensor", since="DRAFTED"):
    """[B, S]: 0 .. S - 1 for every row."""

    ids: fx.Node

    @staticmethod
    def fake(ids):
        return ids.new_empty(ids.shape[:2], dtype=torch.int64)


class UnpackIndex(Operator, schema="unpack_index(Tensor order) -> Tensor", since="DRAFTED"):
    """[B, S]: the caller's column -> packed column."""

    order: fx.Node

    @staticmethod
    def fake(order):
        return order.new_empty(order.shape)


class AheadIndex(Operator, schema="ahead_index(Tensor lengths, int lookahead) -> Tensor", since="DRAFTED"):
    """[B, L]: where each row's lookahead stands, right behind its lengths[b] tokens."""

    lengths: fx.Node
    lookahead: int

    @staticmethod
    def fake(lengths, lookahead):
        return lengths.new_empty(lengths.shape[0], lookahead)


class TakePositions(Operator, schema="take_positions(Tensor hidden, Tensor index) -> Tensor"):
    """[B, T, E] at index [B, M] -> [B, M, E]."""

    hidden: fx.Node
    index: fx.Node

    @staticmethod
    def fake(hidden, index):
        return hidden.new_empty(hidden.shape[0], index.shape[1], hidden.shape[2])


class ScoreRows(
    Operator,
    schema="score_rows(Tensor lengths, Tensor? lookahead_ids, int window, int[] eos_ids, int futures=1) -> Tensor",
    since="PRUNED",
):
    """[B, W + M L] columns of the query rows that score, -1 where there is none."""

    lengths: fx.Node
    lookahead_ids: fx.Node | None
    window: int
    eos_ids: list[int]
    futures: int

    @staticmethod
    def fake(lengths, lookahead_ids, window, eos_ids, futures=1):
        ahead = 0 if lookahead_ids is None else lookahead_ids.shape[1]
        return lengths.new_empty(lengths.shape[0], window + ahead)


class TakeRows(Operator, schema="take_rows(Tensor query, Tensor rows) -> Tensor", since="PRUNED"):
    """[B, H, T, D] at rows [B, R] -> [B, H, R, D]."""

    query: fx.Node
    rows: fx.Node

    @staticmethod
    def fake(query, rows):
        return query.new_empty(query.shape[0], query.shape[1], rows.shape[1], query.shape[3])
