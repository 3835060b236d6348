"""KV heads with budgets of their own, as ONNX graphs pass them: [B, K, M, D], padded to the most that one may have.

before: keys [B, T, D], one head's slots behind the other's, of this layer or of all layers; starts, counts [B, K]
after:  keys [B, K, M, D], zeros behind counts;                                            positions [B, K, M], -1 there
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specpass.cache.joined import by_head
from specpass.cache.protocol import BudgetLayer


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where the heads of one layer lie.

    Attributes: first: number of its first head in the storage; most: slots M that one may have for the prompt.
    """

    first: int
    most: int

    @classmethod
    def of(cls, layer: BudgetLayer, kv_heads: int, budget: int, full: bool) -> Heads:
        """Args: budget: C of the layer; full: whether it chooses, and does not keep a window of C."""
        together = layer.sharers or (layer,)
        most = layer.cache.method.longest(budget, kv_heads, len(together)) if full else budget
        return cls(together.index(layer) * kv_heads, most)

    def padded(
        self, keys: Tensor, values: Tensor, positions: Tensor, starts: Tensor, counts: Tensor, ahead: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, K, M + L, D] and positions [B, K, M].

        Args: keys [B, T, D], values [B, T, Dv], where L = `ahead` slots of a lookahead follow each head's own;
        positions [B, T'], where nothing does; starts [B, K] of keys; counts [B, K] positions.
        """
        number = torch.arange(self.first, self.first + starts.shape[1], device=starts.device)
        states = (by_head(each, starts, counts + ahead, 0, self.most + ahead) for each in (keys, values))
        return *states, by_head(positions, starts - number * ahead, counts, -1, self.most)
