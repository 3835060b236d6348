"""What a model makes of cached columns: which changes keep columns, and heads, apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.interpret.made import Recipe
from specpass.interpret.watch import Attention, Listener, Watch

B, K, T, D = 2, 2, 7, 4


class Seen(Listener):
    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        self.made, recipe = made, self.watch.recipe
        assert isinstance(recipe, Recipe)
        self.columns, self.heads = (recipe.keeps_apart(axis, call.key, call.value) for axis in (2, 1))
        return call.run()


def filled(key: Tensor) -> Tensor:
    """As MLA's keys are put together."""
    new = key.new_empty(B, K, T, 2 * D)
    new[..., :D] = key * 2
    new[..., D:].copy_(key.expand(B, K, T, D))
    return new


@pytest.mark.parametrize(
    ("change", "made", "columns", "heads"),
    [
        (lambda key: key.unsqueeze(2).expand(B, K, 2, T, D).reshape(B, 2 * K, T, D), False, True, False),
        (lambda key: F.rms_norm(key, (D,)), True, True, True),
        (filled, True, True, True),
        (lambda key: torch.cat(torch.split(key, 2, -1)[::-1], -1), True, True, True),
        (lambda key: key + key.mean(1, keepdim=True), True, True, False),
        (lambda key: key + key.mean(2, keepdim=True), True, False, True),
        (lambda key: key * torch.arange(T)[:, None], True, False, True),
        (lambda key: key.cumsum(2), True, False, True),
    ],
    ids=["repeated", "normed", "filled", "swapped", "heads-mixed", "columns-mixed", "placed", "summed"],
)
def test_changes(change: Callable[[Tensor], Tensor], made: bool, columns: bool, heads: bool) -> None:
    key, value = torch.randn(B, K, T, D), torch.randn(B, K, T, D)
    seen: Any = Seen()
    seen.watch = Watch(seen, records=True)
    with seen.watch:
        seen.watch.follow(0, key, value)
        keys = change(key)
        values = value.repeat_interleave(keys.shape[1] // K, 1)
        F.scaled_dot_product_attention(torch.randn(B, keys.shape[1], T, keys.shape[3]), keys, values)
    assert (seen.made, seen.columns, seen.heads) == (made, columns, heads)
    assert seen.watch.recipe is None, "held no longer than needed"
