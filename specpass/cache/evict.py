"""Generated tokens beyond M slots are evicted, a block at a time, between two steps and on the device.

Nothing waits for the device, and no graph knows of it: a step's graph takes its slots from `lengths`, which are lower
afterwards, and finds the storage where it was. Behind the pruned prompt each KV head has M slots; where they are full,
the newest W tokens stay, and of the others a block of the lowest scores goes (worth.py). Where prompt and answer share
one budget, the prompt's slots are among the others. Positions go on all the same: what is kept has been rotated by
where it stood.

Symbols: B batch, K KV heads, C slots of the prompt, M of what follows, P of those to choose among (M, or C + M), W
window of newest tokens, D head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specpass.cache.worth import ASKING, FORESEEING, POLICIES, TURNING, worth
from specpass.errors import GeneratedError
from specpass.kernels.attention import first_read
from specpass.methods.base import Method
from specpass.rewrite.sites import Rotation

if TYPE_CHECKING:
    from specpass.cache.protocol import BudgetLayer

LEAST = 8  # slots M: two newest tokens, and two blocks
WINDOW = 32  # newest tokens that no policy evicts, where M is large enough


@dataclasses.dataclass(frozen=True)
class Bound:
    """How many generated tokens a KV head holds, and which ones stay.

    Args:
        slots: M. policy: one of POLICIES. shared: they stay in C + M slots together with the prompt's.

    Raises: GeneratedError.
    """

    slots: int
    policy: str = "recent"
    shared: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < LEAST:
            raise GeneratedError(
                f"generated={self.slots!r}: expected a number of KV slots for generated tokens, {LEAST} at least, e.g. "
                "generated=512; None bounds nothing."
            )
        if self.policy not in POLICIES:
            raise GeneratedError(f"evict={self.policy!r}: expected one of {POLICIES}.")

    @classmethod
    def of(cls, slots: Any, policy: Any, shared: Any = False) -> Bound | None:
        """None where generated tokens are not bounded.

        Raises: GeneratedError: also where a policy is named, or a budget shared, and nothing is to be evicted.
        """
        if slots is not None:
            return cls(slots, policy, bool(shared))
        named = f"evict={policy!r}" if policy != POLICIES[0] else "share_budget=True" if shared else ""
        if named:
            raise GeneratedError(
                f"{named} says what goes beyond so many slots, and generated=None sets no such number: pass "
                "generated= too, e.g. generated=512."
            )
        return None

    def check(self, method: Method, bits: int) -> None:
        """Raises: GeneratedError: the prompt's slots cannot go one by one, or no draft is there for a policy to ask."""
        if not method.needs_draft:
            self.check_foresees(f"{method.name} has no draft here: pass draft= with SpecKV, SpecKVPC or SpecPC")
        elif method.futures > 1:
            self.check_foresees(f"it goes on behind one lookahead, and futures={method.futures}: leave futures out")
        if not self.shared:
            return
        why = ""
        if method.spread != "uniform":
            why = f"spread={method.spread!r}, whose KV heads have budgets of their own: use spread='uniform'"
        elif bits:
            why = f"cache_bits={bits}, which holds a prompt's slots in groups: leave cache_bits out"
        if why:
            raise GeneratedError(
                f"share_budget=True with {why}, or let the prompt keep its slots (share_budget=False)."
            )

    def check_asks(self, made: Iterable[str]) -> None:
        """Args: made: layers whose attention reads what is made of their cached keys.

        Raises: GeneratedError: there are some, and the policy asks how much attention these keys get.
        """
        layer = next(iter(made), None)
        if self.asks and layer is not None:
            raise GeneratedError(
                f"evict={self.policy!r}: attention of {layer} reads what is made of cached keys (MLA), and these "
                "get none themselves: use evict='recent' or 'redundant'."
            )

    def check_foresees(self, why: str) -> None:
        """Args: why: no draft can go on, and what to do about it; "": one can.

        Raises: GeneratedError: the policy needs one that does.
        """
        if self.foresees and why:
            raise GeneratedError(
                f"evict={self.policy!r} lets a draft go on behind the answer, and {why}, or use evict='attention', "
                "which asks the newest tokens."
            )

    def check_turns(self, model: str, rotations: Mapping[str, Rotation | str | None], why: str = "") -> None:
        """Args: model: its type. rotations: of each layer that is pruned, by its path; None: nobody looked. why: it
        cannot be had at all.

        Raises: GeneratedError: the policy asks how queries turn with their positions, and that is not known.
        """
        if not self.turns:
            return
        unknown = next((f"{path}: {own}" for path, own in rotations.items() if isinstance(own, str)), "")
        known = [own for own in rotations.values() if isinstance(own, Rotation)]
        if known and not any(own.omega for own in known):
            unknown = unknown or "nothing turns the queries of its full attention with their positions"
        if why or unknown:
            raise GeneratedError(
                f"evict={self.policy!r} scores keys by how rotary embeddings turn queries, and that is not known of "
                f"this {model} ({why or unknown}): use evict='attention', or another policy."
            )

    @property
    def asks(self) -> bool:
        """Whether the newest queries say what stays."""
        return self.policy in ASKING

    @property
    def turns(self) -> bool:
        """Whether it counts how these turn with their positions."""
        return self.policy == TURNING

    @property
    def foresees(self) -> bool:
        """Whether the queries that are asked are those of tokens still to come, which a draft writes."""
        return self.policy == FORESEEING

    @property
    def ahead(self) -> int:
        """How many of these there are: as many as the newest, which are asked otherwise."""
        return self.window if self.foresees else 0

    @property
    def room(self) -> int:
        """Slots of each KV head behind the prompt's: M, and those where tokens to come stand while they are asked."""
        return self.slots + self.ahead

    @property
    def noted(self) -> int:
        """Newest queries that are noted, where they are asked for: W, and four times as many for a mean of them."""
        return min(4 * self.window, self.slots) if self.turns else self.window

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


def taken(buffer: Tensor, place: Tensor) -> Tensor:
    """[B, K, P, D]: what lies at place [B, K, P] of a storage [B, T, D]."""
    return buffer.gather(1, _index(buffer, place)).unflatten(1, place.shape[1:])


def _index(buffer: Tensor, place: Tensor) -> Tensor:
    """[B, K * P, D] of place [B, K, P], for gather and scatter along a storage."""
    return place.flatten(1)[..., None].expand(-1, -1, buffer.shape[2])


def drop(score: Tensor, excess: Tensor, goes: Tensor) -> Tensor:
    """[B, K, P] slots in the order in which they stay, the dropped ones last; free slots behind what is in use too.

    Args: score [B, K, P]; excess [B, K]: how many slots go; goes [B, K, P]: of those that may. Ties: the first goes.
    """
    rank = score.masked_fill(~goes, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < excess[..., None]).long().argsort(dim=-1, stable=True)


def evict(layer: BudgetLayer, bound: Bound, kept: int, seed: int) -> None:
    """Let a layer hold `kept` generated tokens of each row at most, in place; C + `kept` slots where these are shared.

    A layer with a window of its own drops what nobody reads any more.
    """
    assert layer.lengths is not None
    assert layer.kept_positions is not None
    if not layer.is_full:
        _slide(layer, bound.window)
        return
    behind = layer.behind
    assert behind is not None
    first, size, most = behind, bound.slots, kept
    if bound.shared:
        first, size = torch.zeros_like(behind), layer.slots - bound.ahead
        most = size - bound.slots + kept
    used = layer.lengths - first
    excess = (used - most).clamp(min=0)
    slot = torch.arange(size, device=used.device)
    place = layer.places(first[..., None] + slot, torch.arange(len(used), device=used.device))
    place = place.unflatten(1, (layer.kv_heads, -1))
    assert layer.key_buffer is not None
    assert layer.value_buffer is not None
    inside, goes = slot < used[..., None], slot < used[..., None] - bound.window
    keys = taken(layer.key_buffer, place)
    softcap = 0.0 if layer.readers is None else layer.readers.softcap
    score = worth(bound.policy, keys, inside, goes, layer.queries, softcap, seed, layer.rotation)
    order = drop(score, excess, goes)
    for buffer in (layer.key_buffer, layer.value_buffer):
        states = taken(buffer, place.gather(-1, order))
        buffer.scatter_(1, _index(buffer, place), states.flatten(1, 2))
    _renumber(layer, order, excess, used - excess, behind - first)
    layer.lengths.sub_(excess)


def _renumber(layer: BudgetLayer, order: Tensor, excess: Tensor, left: Tensor, prompt: Tensor) -> None:
    """Note which generated tokens, and which positions of the prompt, lie in the slots that stay.

    Args: order [B, K, P]: see drop; excess [B, K] slots went and left [B, K] stay; prompt [B, K]: the prompt's, of
    those to choose among.
    """
    if layer.ordinals is None:
        layer.ordinals = torch.full(order.shape, -1, dtype=torch.int64, device=order.device)
        layer.evicted, layer.settled = torch.zeros_like(excess), torch.zeros_like(excess)
    numbers, positions = layer.generated, layer.kept_positions
    assert numbers is not None
    assert positions is not None
    assert layer.evicted is not None
    assert layer.settled is not None
    slot = torch.arange(order.shape[2], device=order.device)
    stays = ((order < prompt[..., None]) & (slot < left[..., None])).sum(-1)  # of the prompt's; they come first
    source = order.gather(-1, (slot + stays[..., None]).clamp(max=order.shape[2] - 1)) - prompt[..., None]
    layer.ordinals.copy_(numbers.gather(-1, source.clamp(min=0)))
    layer.settled.copy_(left - stays)
    layer.evicted.add_(excess - (prompt - stays))
    if layer.cache.bound is not None and layer.cache.bound.shared:
        size = positions.shape[2]
        kept = positions.gather(-1, order[..., :size].clamp(max=size - 1))
        positions.copy_(kept.masked_fill(slot[:size] >= stays[..., None], -1))


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
