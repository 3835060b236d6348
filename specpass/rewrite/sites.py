"""The attention sites of a graph."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from specpass.dialect.cache import AppendKv, Fill, GatherKv, GatherRagged, KeepKv
from specpass.graph.walk import value
from specpass.sizes import FULL, Span


@dataclasses.dataclass(frozen=True)
class Alibi:
    """A bias of keys by their positions (ALiBi): (slopes times position, rounded to dtype) times factor.

    Args:
        slopes: the node of H numbers, in any shape.
        positions: [B, K, C] of a decode site's prompt slots, None where columns or slots are the positions.
    """

    slopes: fx.Node
    dtype: torch.dtype
    factor: float
    positions: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a head's queries and keys turn with their positions (rotary embeddings): F pairs of its D dimensions.

    Args:
        first: [F] dimensions, one of each pair; empty where nothing turns.
        second: [F] the other of each. Dimensions in no pair stay as they are.
        omega: [F] radians by which (first, second) turns from one position to the next.
    """

    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()
    omega: tuple[float, ...] = ()

    def like(self, other: Rotation) -> bool:
        """Whether it is the same but for rounding."""
        pairs = zip(self.omega, other.omega, strict=False)
        same = (self.first, self.second) == (other.first, other.second)
        return same and all(math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-9) for pair in pairs)


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention site.

    Args:
        layer: its number.
        module: its path in the model.
        query: [B, H, T, D].
        key: [B, K, T, D] as attention reads it.
        value: [B, K, T, Dv].
        cache: the node that writes the layer's cache.
        attention: the attention node.
        scale: of the softmax.
        softcap: of the logits, 0.0 for none.
        sinks: [H] logits that belong to no key, or None.
        budget: slots C of each KV head, 0 where nothing is pruned.
        span: what its queries read of what is in front of them.
        alibi: the bias of its keys, or None.
        bias: the node of that, [B or 1, H, T], once a pass has made it.
        heads_apart: each head reads one cached head; else (MLA's one latent) a choice of positions serves all heads.
        unquantized: why its cache stays in the model's dtype where others are in fewer bits; "" where nothing is said.
        made: attention reads what is made of cached keys and values (MLA), not these.
        reads: the site in front of it whose cache it reads, having none of its own; that one chooses what is kept.
        rotation: how its queries and keys turn with their positions, or why that is not known; None: nobody asked.
    """

    layer: int
    module: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    cache: fx.Node
    attention: fx.Node
    scale: float
    softcap: float = 0.0
    sinks: fx.Node | None = None
    budget: int = 0
    span: Span = FULL
    alibi: Alibi | None = None
    bias: fx.Node | None = None
    heads_apart: bool = True
    unquantized: str = ""
    made: bool = False
    reads: str = ""
    rotation: Rotation | str | None = None

    @property
    def changes(self) -> tuple[Any, ...]:
        """What is done to the logits, as `importance` takes it; empty where nothing is."""
        if self.bias is not None:
            return self.softcap, self.sinks, self.bias
        return (self.softcap, self.sinks) if self.softcap or self.sinks is not None else ()

    @property
    def options(self) -> tuple[Any, ...]:
        """Last arguments of an attention operator: what is done to the logits, and what its queries read."""
        if self.bias is not None:
            return self.softcap, self.sinks, self.span.sliding, self.span.chunk, self.bias
        if not self.span.positions:
            return self.changes
        return self.softcap, self.sinks, self.span.sliding, self.span.chunk

    @property
    def cached(self) -> tuple[fx.Node, fx.Node]:
        """Keys and values as attention reads them."""
        return self.key, self.value

    @property
    def is_full(self) -> bool:
        """Whether its K/V grow with the prompt: such a site is scored and pruned, the others keep what they read."""
        return not self.span.positions

    @property
    def kv_heads(self) -> int:
        return self.kv_shape[0]

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(K, D, Dv) of the layer's cache."""
        views = (Fill, KeepKv, AppendKv, GatherKv, GatherRagged)
        write = next(view.of(self.cache) for view in views if view.is_call(self.cache))
        key, val = value(write.key), value(write.value)
        return int(key.shape[1]), int(key.shape[3]), int(val.shape[3])


@dataclasses.dataclass(frozen=True)
class Sites:
    """All attention sites, in the model's order; a fact."""

    sites: tuple[Site, ...]

    @property
    def owners(self) -> tuple[Site, ...]:
        """Those with a cache of their own."""
        return tuple(site for site in self.sites if not site.reads)
