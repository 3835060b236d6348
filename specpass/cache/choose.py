"""A budget that is chosen for each prompt once all layers have read it: the smallest that keeps enough attention.

The prefill keeps the largest budget's slots, which hold those of every smaller one, and says what each would keep (see
select_rungs). One look at these numbers, the only one of a prompt, and the storage is moved into the chosen size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specpass.parallel.agree import mean_of_ranks
from specpass.parallel.shards import Ranks

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a prompt got.

    Args:
        budget: slots C of each KV head.
        asked: the share of the attention that was to be kept.
        share: what is kept, in the mean over layers, of the row of the batch that keeps least.
        layers: the same row's share in each pruned layer.
    """

    budget: int
    asked: float
    share: float
    layers: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """A layer as its prompt left it: keys [B, K * (C + N), D], values, lengths [B, K], positions and rung [B, K, C],
    shares [B, R]."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    positions: Tensor
    rung: Tensor
    shares: Tensor


def choose(shares: Sequence[Tensor], rungs: Sequence[int], asked: float) -> tuple[int, Kept]:
    """The first of R `rungs` that keeps what is `asked` for in every row, in the mean over layers, else the last.

    Not in every layer: a first layer attends nearly everywhere, and would have every prompt kept whole.

    Args: shares: of each layer [B, R].
    Returns: the rung's number, and what it keeps.
    """
    found = torch.stack([layer.to(shares[0].device) for layer in shares]).cpu()  # [layers, B, R]
    least = found.mean(0).amin(0)  # [R]
    enough = (least >= asked).tolist()
    index = enough.index(True) if True in enough else len(rungs) - 1
    row = int(found.mean(0)[:, index].argmin())
    return index, Kept(rungs[index], asked, float(least[index]), tuple(found[:, row, index].tolist()))


def shrink(layer: Candidates, index: int, budget: int) -> Candidates:
    """The slots of rung `index`, C' = `budget` of each KV head, and the free ones behind them with what waits there."""
    batch, heads, most = layer.positions.shape
    dropped = (layer.rung > index) | (layer.positions < 0)
    order = dropped.long().argsort(dim=-1, stable=True)[..., :budget]  # what is kept, in its order, comes first
    lengths = (~dropped).sum(-1)
    slot = torch.arange(layer.keys.shape[1] // heads - most + budget, device=layer.keys.device)
    behind = layer.lengths[..., None] + slot - lengths[..., None]  # free slots, which may hold the lookahead
    padded = torch.nn.functional.pad(order, (0, len(slot) - budget))
    source = torch.where(slot < lengths[..., None], padded, behind)  # [B, K, C' + N]

    def move(storage: Tensor) -> Tensor:
        own = storage.unflatten(1, (heads, -1))
        return own.gather(2, source[..., None].expand(-1, -1, -1, own.shape[3])).flatten(1, 2)

    positions = layer.positions.masked_fill(dropped, -1).gather(-1, order)
    shares = layer.shares[:, index].clone()
    return Candidates(
        move(layer.keys), move(layer.values), lengths, positions, layer.rung.new_empty(batch, heads, 0), shares
    )


def choose_budget(cache: BudgetCache, ranks: Ranks | None) -> Kept:
    """Choose for a prompt whose layers hold the largest budget's slots, and move each layer into the chosen size.

    Args: ranks: whose heads choose together.
    """
    layers = [layer for layer in cache.budgeted if layer.rung is not None]
    share = cache.method.share
    assert share is not None, "a share of the attention chooses"
    every = mean_of_ranks([layer.shares for layer in layers], ranks)
    index, kept = choose(every, cache.rungs, share)
    for layer, shares in zip(layers, every, strict=True):
        held = (layer.key_buffer, layer.value_buffer, layer.lengths, layer.kept_positions, layer.rung, shares)
        found = shrink(Candidates(*held), index, cache.rungs[index])
        layer.key_buffer, layer.value_buffer, layer.lengths = found.keys, found.values, found.lengths
        layer.kept_positions, layer.rung, layer.shares = found.positions, found.rung, found.shares
    return kept
