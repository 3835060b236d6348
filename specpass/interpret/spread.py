"""Storage of KV heads that share budgets, a layer at a time: what graphs do in gather_prune and share_layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specpass.cache.protocol import BudgetLayer
from specpass.dialect.define import SPEC
from specpass.methods.base import Method
from specpass.parallel.agree import all_of_ranks
from specpass.parallel.shards import Ranks
from specpass.passes.share_layers import UNLIKE
from specpass.rewrite import Refusal


class Unspread(Refusal):
    """KV heads cannot share budgets here: equal ones would be something else than was asked for, so it is an error."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a layer keeps until all have read the prompt: keys [B, K (X + L), D], values, lengths [B, K], and packed
    positions and their worth [B, K X]; no worth where all of them stay."""

    layer: BudgetLayer
    keys: Tensor
    values: Tensor
    lengths: Tensor
    positions: Tensor
    worth: Tensor | None


def store_ragged(
    layer: BudgetLayer, key: Tensor, value: Tensor, positions: Tensor, taken: Tensor, most: int, room: int
) -> None:
    """A layer whose heads share their slots.

    Args: key [B, K, T, D], value [B, K, T, Dv]; positions [B, K, M]; taken: these and the lookahead's [B, K, M + L];
    most: slots of a head, in the mean; room N.
    """
    heads, ahead = key.shape[1], taken.shape[2] - positions.shape[2]
    kept = SPEC.gather_ragged(key, value, taken, heads * (most + ahead), room - ahead)
    layer.key_buffer, layer.value_buffer, used = kept
    layer.lengths = used - ahead
    layer.starts, layer.counts = SPEC.head_offsets(layer.lengths, room)
    layer.kept_positions = SPEC.pack_heads(positions, heads * most)
    layer.is_initialized = True


class Shared:
    """The layers of one prompt whose heads share one storage (`spread="global"`)."""

    def __init__(self) -> None:
        self.layers: list[Candidate] = []
        self.ahead = 0

    def add(
        self,
        layer: BudgetLayer,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        taken: Tensor,
        most: int,
        worth: Tensor | None,
    ) -> None:
        """Let a layer keep its candidates.

        Args: as store_ragged; most: X, of a head in the mean; worth [B, K, M], None: all of them stay.

        Raises: Unspread: its heads are unlike those of the layers before.
        """
        heads = positions.shape[1]
        kept = [each.keys.shape[2:] + each.values.shape[2:] + each.lengths.shape[1:] for each in self.layers[:1]]
        if kept and kept[0] != key.shape[3:] + value.shape[3:] + key.shape[1:2]:
            raise Unspread(UNLIKE)
        self.ahead = taken.shape[2] - positions.shape[2]
        keys, values, used = SPEC.gather_ragged(key, value, taken, heads * (most + self.ahead), 0)
        packed = SPEC.pack_heads(positions, heads * most)
        worth = None if worth is None else SPEC.pack_heads(worth, heads * most)
        self.layers.append(Candidate(layer, keys, values, used - self.ahead, packed, worth))

    def finish(self, how: Method, budget: int, room: int, ranks: Ranks | None) -> None:
        """Choose among the candidates of all layers, and of all ranks.

        Args: C slots of each head, in the mean; room N.
        """
        if not self.layers:
            return
        names = ("keys", "values", "lengths", "positions")
        lists = [[getattr(each, name) for each in self.layers] for name in names]
        worth = [each.worth for each in self.layers if each.worth is not None]
        if worth and ranks is not None:
            every = all_of_ranks(torch.stack(worth), ranks).flatten(0, 1)
            total = ranks.size * len(worth) * self.layers[0].lengths.shape[1] * budget
            lists[3], worth = SPEC.choose_shared(lists[3], every, total, ranks.rank), []
            budget = min(how.candidates(budget), how.most(budget, ranks.size))
        found = SPEC.share_layers(*lists, worth, budget, self.ahead, room)
        sharers = [each.layer for each in self.layers]  # without those that had to stay whole, until the next prompt
        for each, lengths, starts, counts in zip(self.layers, *found[3:], strict=True):
            layer = each.layer
            layer.key_buffer, layer.value_buffer, layer.kept_positions = found[:3]
            layer.lengths, layer.starts, layer.counts, layer.sharers = lengths, starts, counts, sharers
            layer.is_initialized = True
        self.layers.clear()
