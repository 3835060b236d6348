"""Bounded answers: what lies in slots, and eager attention over exactly that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def seen_by_step(cache: Any, length: int, total: int, row: int = 0) -> list[Tensor]:
    """Of each layer [K, T] bool: which of `total` tokens, a row's prompt of `length` among them, lie in slots."""
    found = []
    for layer in cache.budgeted:
        mask = torch.zeros(layer.kv_heads, total, dtype=torch.bool)
        for head, own in enumerate(layer.positions[row]):
            mask[head, own[own >= 0]] = True
        numbers = layer.generated
        if numbers is None:
            mask[:, length:] = True
        else:
            for head, own in enumerate(numbers[row]):
                mask[head, length + own[own >= 0]] = True
        found.append(mask)
    return found


def rotated_apart(
    target: Any, ids: Tensor, masks: list[list[Tensor]], length: int, states: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Logits [n, V] of ids [1, T] behind the prompt, each token attending to what `masks[i]` shows: plain attention.

    Args: states: gets each layer's queries [1, H, T, D] and keys [1, K, T, D].
    """
    layers, group = target.config.num_hidden_layers, 2
    total = ids.shape[1]
    allowed = torch.ones(total, total).tril().bool().expand(layers, 4, -1, -1).clone()
    for index, own in enumerate(masks):
        for layer, mask in enumerate(own):
            row = length + index
            allowed[layer, :, row, : mask.shape[1]] &= mask.repeat_interleave(group, 0)
    calls = iter(range(layers))
    before = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        if states is not None:
            states.append((query, key))
        how = {"scale": how.get("scale"), "enable_gqa": True}
        return before(query, key, value, attn_mask=allowed[next(calls)][None], **how)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        return target(ids, use_cache=False).logits[0, length:]
