"""Position ids of a call that brings none, or more than its graph needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import positions_of, tokens_of
from specpass.interpret.beside import positions_for


def number(kwargs: dict[str, Any]) -> None:
    """Tell a prompt the positions that its model would count."""
    tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(tokens, torch.Tensor):
        padded = isinstance(mask, torch.Tensor) and mask.dim() == 2
        kwargs["position_ids"] = positions_of(mask if padded else tokens.new_ones(1, tokens.shape[1]).long())


def number_step(target: nn.Module, cache: BudgetCache, kwargs: dict[str, Any]) -> None:
    """Tokens behind a padded batch get positions by the mask, where it tells of all tokens so far."""
    tokens, mask = tokens_of(kwargs), kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return
    count = tokens.shape[1]
    if mask.shape[1] == int(cache.seen) + count:
        kwargs["position_ids"] = positions_for(target, tokens, mask, {"past_key_values": cache})[..., -count:]


def take_one_axis(kwargs: dict[str, Any]) -> None:
    """Position ids [P, B, q] of text (models with mrope get them from generate) say the same on each axis."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3:
        kwargs["position_ids"] = positions[0]
