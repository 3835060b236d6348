"""Generated tokens beyond M slots are evicted, a block at a time, between two steps and on the device.

Nothing waits for the device, and no graph knows of it: a step's graph takes its slots from `lengths`, which are lower
afterwards, and finds the storage where it was. Behind the pruned prompt each KV head has M slots; where they are full,
the newest W tokens stay, and of the others a block of the lowest scores goes. Positions go on all the same: what is
kept has been rotated by where it stood.

Symbols: B batch, K KV heads, M slots, W window of newest tokens, D head dimension.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specpass.cache.layer import Storage
from specpass.errors import GeneratedError
from specpass.kernels.attention import first_read

if TYPE_CHECKING:
    from specpass.cache.protocol import BudgetLayer

POLICIES = ("recent", "redundant", "random")  # which tokens stay
LEAST = 8  # slots M: two newest tokens, and two blocks
WINDOW = 32  # newest tokens that no policy evicts, where M is large enough
SEED = 0  # of the random choice


@dataclasses.dataclass(frozen=True)
class Bound:
    """How many generated tokens a KV head holds, and which ones stay.

    Args:
        slots: M. policy: one of POLICIES.

    Raises: GeneratedError.
    """

    slots: int
    policy: str = "recent"

    def __post_init__(self) -> None:
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < LEAST:
            raise GeneratedError(
                f"generated={self.slots!r}: expected a number of KV slots for generated tokens, {LEAST} at least, e.g. "
                "generated=512; None bounds nothing."
            )
        if self.policy not in POLICIES:
            raise GeneratedError(f"evict={self.policy!r}: expected one of {POLICIES}.")

    @classmethod
    def of(cls, slots: Any, policy: Any) -> Bound | None:
        """None where generated tokens are not bounded.

        Raises: GeneratedError: also where a policy is named and nothing is to be evicted.
        """
        if slots is None and policy != POLICIES[0]:
            raise GeneratedError(
                f"evict={policy!r} says what goes beyond so many slots, and generated=None sets no such number: pass "
                "generated= too, e.g. generated=512."
            )
        return None if slots is None else cls(slots, policy)

    @property
    def window(self) -> int:
        """W: a quarter of M, 32 at most."""
        return min(WINDOW, self.slots // 4)

    @property
    def most(self) -> int:
        """Tokens that can be appended at once."""
        return self.slots - self.window

    def kept(self, tokens: int) -> int:
        """Tokens that stay where room for `tokens` more is made: blocks of 2 W at least are free then."""
        return self.slots - max(tokens, 2 * self.window)


def scores(layer: Storage, place: Tensor, used: Tensor, bound: Bound, seed: int) -> Tensor:
    """[B, K, M] float32: of generated tokens those with the lowest scores go.

    "recent": their order. "random": drawn, the control. "redundant": less the cosine of a token's key with the mean of
    all of them: the tokens whose keys are most like the others' go. It is the mean cosine with every other key, the
    redundancy of R-KV (arXiv 2505.24133, section 3.2, without its threshold), and what KeyDiff keeps by (arXiv
    2504.15364, equation 6).

    Args: place [B, K, M]: where the slots lie in the storage; used [B, K] of them.
    """
    slot = torch.arange(bound.slots, device=place.device)
    if bound.policy == "recent":
        return slot.float().expand(place.shape)
    if bound.policy == "random":
        generator = torch.Generator(place.device).manual_seed(SEED + seed)
        return torch.rand(place.shape, generator=generator, device=place.device)
    assert layer.key_buffer is not None
    keys = torch.nn.functional.normalize(taken(layer.key_buffer, place).float(), dim=-1)
    inside = (slot < used[..., None])[..., None]
    mean = torch.where(inside, keys, 0.0).sum(2, keepdim=True)  # of which the length changes no order
    return -(keys * mean).sum(-1)


def taken(buffer: Tensor, place: Tensor) -> Tensor:
    """[B, K, M, D]: what lies at place [B, K, M] of a storage [B, T, D]."""
    return buffer.gather(1, _index(buffer, place)).unflatten(1, place.shape[1:])


def _index(buffer: Tensor, place: Tensor) -> Tensor:
    """[B, K * M, D] of place [B, K, M], for gather and scatter along a storage."""
    return place.flatten(1)[..., None].expand(-1, -1, buffer.shape[2])


def drop(score: Tensor, used: Tensor, excess: Tensor, window: int) -> Tensor:
    """[B, K, M] slots in the order in which they stay, the dropped ones last; free slots behind what is in use too.

    Args: score [B, K, M]; used and excess [B, K]: slots in use, and how many of them go; window: newest that stay.
    """
    slot = torch.arange(score.shape[2], device=score.device)
    spared = slot >= used[..., None] - window
    rank = score.masked_fill(spared, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < excess[..., None]).long().argsort(dim=-1, stable=True)


def evict(layer: BudgetLayer, bound: Bound, kept: int, seed: int) -> None:
    """Let a layer hold `kept` generated tokens of each row at most, in place.

    A layer with a window of its own drops what nobody reads any more.
    """
    assert layer.lengths is not None
    assert layer.kept_positions is not None
    if layer.is_sliding or (layer.found is not None and layer.found.positions):
        _slide(layer, bound.window)
        return
    prompt = layer.behind
    assert prompt is not None
    used = layer.lengths - prompt
    excess = (used - kept).clamp(min=0)
    slot = torch.arange(bound.slots, device=used.device)
    if layer.ordinals is None:
        layer.ordinals = torch.full((*used.shape, bound.slots), -1, dtype=torch.int64, device=used.device)
        layer.evicted = torch.zeros_like(used)
        layer.settled = torch.zeros_like(used)
    assert layer.evicted is not None
    assert layer.settled is not None
    numbers = layer.generated
    assert numbers is not None
    place = layer.places(prompt[..., None] + slot, torch.arange(len(used), device=used.device))
    place = place.unflatten(1, (layer.kv_heads, -1))
    order = drop(scores(layer, place, used, bound, seed), used, excess, bound.window)
    for buffer in (layer.key_buffer, layer.value_buffer):
        assert buffer is not None
        states = taken(buffer, place.gather(-1, order))
        buffer.scatter_(1, _index(buffer, place), states.flatten(1, 2))
    layer.lengths.sub_(excess)
    layer.evicted.add_(excess)
    layer.settled.copy_(used - excess)
    layer.ordinals.copy_(numbers.gather(-1, order))


def _slide(layer: BudgetLayer, window: int) -> None:
    """Drop what lies in front of all that the next tokens read, those behind a crop of `window` tokens included."""
    span = layer.found or layer.span
    assert span is not None
    assert layer.kept_positions is not None
    first = first_read((layer.lengths - window).clamp(min=0), span.sliding, span.chunk).clamp(min=0)
    slot = torch.arange(layer.slots, device=first.device)
    source = (slot + first[..., None]).clamp(max=layer.slots - 1)  # [B, K, P]
    rows = torch.arange(len(first), device=first.device)
    place = layer.places(source, rows).unflatten(1, (layer.kv_heads, -1))
    for buffer in (layer.key_buffer, layer.value_buffer):
        assert buffer is not None
        buffer.copy_(taken(buffer, place).flatten(1, 2))
    kept = layer.kept_positions
    behind = torch.arange(kept.shape[2], device=kept.device) + first[..., None]
    moved = kept.gather(-1, behind.clamp(max=kept.shape[2] - 1)).masked_fill(behind >= kept.shape[2], -1)
    kept.copy_(moved)
    layer.lengths.sub_(first)
