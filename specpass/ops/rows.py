"""Rows of a batch, in plain aten. Symbols: B batch, S prompt length, L lookahead, W window, H heads, R query rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import rows as dialect
from specpass.ops.bind import bind


def pack_order(attention_mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row with the real tokens first.

    Args: attention_mask [B, S], nonzero where a token is real; ids [B, S] (or embeddings), of which nothing is read.
    Returns: order [B, S] int64 (packed column -> original column), lengths [B] int64.
    """
    real = attention_mask != 0
    order = torch.argsort(torch.logical_not(real).to(torch.int8), dim=1, stable=True)
    return order, real.sum(1)


def pack_appended(attention_mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the q tokens [B, q, ...] that the last q columns of attention_mask [B, M] speak of: real ones first.

    Returns: order [B, q] int64 (packed column -> the caller's), its inverse, the number of masked tokens [B] int64.
    """
    count = tokens.shape[1]
    order, real = pack_order(attention_mask[:, attention_mask.shape[1] - count :], tokens)
    return order, torch.argsort(order, dim=1), count - real


def full_lengths(ids: Tensor) -> Tensor:
    """[B] int64: S for every row of ids [B, S]."""
    return torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64, device=ids.device)


def pack_ids(ids: Tensor, order: Tensor) -> Tensor:
    """[B, S] ids with the real tokens first, by `order` [B, S]."""
    return ids.gather(1, order)


def expand_rows(ids: Tensor, like: Tensor) -> Tensor:
    """[1 or B, S] -> [B, S], dense; B from like."""
    return ids.expand(like.shape[0], -1).clone(memory_format=torch.contiguous_format)


def append_ids(ids: Tensor, extra: Tensor, lengths: Tensor) -> Tensor:
    """[B, S] packed ids -> [B, S + L]: row b's `extra` [B, L] stands right behind its lengths[b] tokens."""
    length = extra.shape[1]
    out = F.pad(ids, (0, length))
    index = lengths[:, None] + torch.arange(length, device=ids.device)
    return out.scatter(1, index, extra.to(ids.dtype))


def append_positions(positions: Tensor, lengths: Tensor, length: int, futures: int = 1) -> Tensor:
    """[B or 1, S] packed position ids -> [B, S + M L]; each future goes on counting from each row's last token."""
    batch, size = lengths.shape[0], positions.shape[1]
    column = torch.arange(size + length * futures, device=positions.device).expand(batch, -1)
    source = torch.minimum(column, (lengths - 1)[:, None])
    packed = positions.expand(batch, -1).gather(1, source)
    behind = column - source
    if futures > 1:
        behind = torch.where(behind > 0, (behind - 1) % length + 1, 0)
    return packed + behind.to(positions.dtype)


def row_index(ids: Tensor) -> Tensor:
    """[B, S]: 0 .. S - 1 for every row."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[:2]).contiguous()


def unpack_index(order: Tensor) -> Tensor:
    """Inverse of the packing order [B, S]: original column -> packed column."""
    return torch.argsort(order, dim=1)


def ahead_index(lengths: Tensor, lookahead: int) -> Tensor:
    """[B, L]: the columns lengths[b] .. lengths[b] + L - 1."""
    return lengths[:, None] + torch.arange(lookahead, device=lengths.device)


def take_positions(hidden: Tensor, index: Tensor) -> Tensor:
    """[B, T, E] hidden states at index [B, M] -> [B, M, E]."""
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2]))


def score_rows(
    lengths: Tensor, lookahead_ids: Tensor | None, window: int, eos_ids: list[int], futures: int = 1
) -> Tensor:
    """Columns of the query rows that score: the last W prompt rows and the lookahead rows.

    Args: lengths [B]; lookahead_ids [B, M L] or None, M `futures` side by side; a future's first EOS counts, its rows
    after that do not.
    Returns: rows [B, W + M L] int64, -1 where there is none.
    """
    rows = torch.arange(-window, 0, device=lengths.device)[None, :] + lengths[:, None]
    rows = rows.clamp(min=-1)
    if lookahead_ids is None:
        return rows
    length = lookahead_ids.shape[1]
    ahead = lengths[:, None] + torch.arange(length, device=lengths.device)
    ended = torch.zeros_like(lookahead_ids, dtype=torch.bool)
    for eos in eos_ids:
        ended = ended | (lookahead_ids == eos)
    ended = ended.view(ended.shape[0], futures, length // futures)
    after = ended.cumsum(2) - ended.to(torch.int64)
    return torch.cat([rows, ahead.masked_fill(after.flatten(1) > 0, -1)], 1)


def take_rows(query: Tensor, rows: Tensor) -> Tensor:
    """[B, H, T, D] queries at rows [B, R] (-1 reads row 0, which `importance` then leaves out) -> [B, H, R, D]."""
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


bind(dialect.PackOrder, pack_order)
bind(dialect.PackAppended, pack_appended)
bind(dialect.FullLengths, full_lengths)
bind(dialect.PackIds, pack_ids)
bind(dialect.ExpandRows, expand_rows)
bind(dialect.AppendIds, append_ids)
bind(dialect.AppendPositions, append_positions)
bind(dialect.RowIndex, row_index)
bind(dialect.UnpackIndex, unpack_index)
bind(dialect.AheadIndex, ahead_index)
bind(dialect.TakePositions, take_positions)
bind(dialect.ScoreRows, score_rows)
bind(dialect.TakeRows, take_rows)
