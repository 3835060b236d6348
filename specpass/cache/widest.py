"""How wide a mask layers of one kind get, which a model makes for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specpass.cache.protocol import BudgetLayer


def tell_widest(layers: list[BudgetLayer]) -> None:
    """Full layers and sliding ones each get one mask of the model's, as wide as the widest of them."""
    for sliding in (False, True):
        alike = [layer for layer in layers if layer.is_sliding == sliding]
        unlike = len({layer.kept for layer in alike}) > 1
        widest = max(alike, key=lambda layer: layer.kept).index if unlike else None
        for layer in alike:
            layer.widest = widest
