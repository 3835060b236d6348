"""ALiBi (arXiv 2108.12409): the bias of a key follows its position, by a slope for each head.

A constant for all keys of a query changes no softmax, so the position of the query is not read.
"""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class KeyColumns(Operator, schema="key_columns(Tensor key) -> Tensor"):
    """[1, 1, T]: 0 .. T - 1, which are the positions of packed rows, and of slots that hold whole prompts."""

    key: fx.Node  # [B, K, T, D]

    @staticmethod
    def fake(key):
        return key.new_empty(1, 1, key.shape[2], dtype=torch.int64)


class SlotPositions(Operator, schema="slot_positions(Tensor positions, Tensor keys) -> Tensor", since="PRUNED"):
    """[B, K, P]: positions of a pruned layer's slots; what was generated goes on behind the row's prompt."""

    positions: fx.Node  # [B, K, C] of the prompt's slots, ascending, unused ones -1
    keys: fx.Node  # [B, K, P, D], of which the shape is read

    @staticmethod
    def fake(positions, keys):
        return positions.new_empty(*positions.shape[:2], keys.shape[2])


class KeyBias(Operator, schema="key_bias(Tensor slopes, Tensor positions, ScalarType dtype, float factor) -> Tensor"):
    """[B or 1, H, T]: slopes times positions, rounded as the model rounds them (in their dtype, then to `dtype`)."""

    slopes: fx.Node  # H numbers, in any shape
    positions: fx.Node  # [B or 1, K or 1, T] int64
    dtype: torch.dtype
    factor: float  # of the rounded product

    @staticmethod
    def fake(slopes, positions, dtype, factor):
        return slopes.new_empty(positions.shape[0], slopes.numel(), positions.shape[2], dtype=dtype)
