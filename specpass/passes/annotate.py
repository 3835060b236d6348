"""annotate: write down query, key, value, cache write, mask and scale of every attention site.

A layer without a cache of its own that attends to another's (shared K/V) is a site, too: it reads what that one keeps.

The graph stays as it is. It is refused, with the site's module path, where one site is not understood. Where others
are, the second way (specpass/interpret) prunes them; else the model runs exactly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import fx

from specpass.dialect.attention import ModifiedAttention
from specpass.dialect.cache import AppendKv, Fill, KeepKv, ShowHeads, Widen
from specpass.errors import NoAttentionSiteError
from specpass.graph.aten import Sdpa, Softmax, View
from specpass.graph.walk import module_path, skip_full_slices, value
from specpass.passes.facts import Inputs, RotationAsked, Spans, Weights
from specpass.passes.read.alibi import read_alibi
from specpass.passes.read.columns import HEADS, LENGTH, Made
from specpass.passes.read.logits import changed_logits
from specpass.passes.read.masks import mask_span
from specpass.passes.read.rotary import hidden_nodes, read_rotation
from specpass.rewrite import Facts, Pass, Refusal, Request
from specpass.rewrite.base import Unspliced
from specpass.rewrite.sites import Alibi, Rotation, Site, Sites
from specpass.sizes import FULL, Span

Write = Fill | AppendKv | KeepKv


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """`layers`: attention sites that there must be; None: as many as write a cache."""

    layers: int | None = None

    name: ClassVar[str] = "annotate"
    stage: ClassVar[str] = "TRACED"
    provides: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        writes: list[Write] = [*Fill.find(gm.graph), *AppendKv.find(gm.graph), *KeepKv.find(gm.graph)]
        reader = Reader({key_of(write): write for write in writes}, facts)
        attentions = [view for node in gm.graph.nodes if (view := Sdpa.match(node) or ModifiedAttention.match(node))]
        sites: list[Site] = []
        refused: Refusal | None = None  # the first
        for attention in attentions:
            try:
                site = reader.read(attention)
                owner = next((other for other in sites if site is not None and other.cache is site.cache), None)
                if site is not None:
                    sites.append(site if owner is None else shared(site, owner))
            except Refusal as refusal:
                refused = refused or refusal
        refused = refused or self._missed(gm, writes, sites, reader)
        if refused is not None and any(site.is_full for site in sites):  # these need not stay exact because of others
            raise Unspliced(refused.reason, refused.module)
        if refused is not None:
            raise refused
        found = Sites(tuple(sites))
        if self.layers not in (None, len(found.owners)):
            raise Refusal(f"the model has {self.layers} layers and {len(found.owners)} recognised attention sites")
        facts.add(found)

    @staticmethod
    def _missed(gm: fx.GraphModule, writes: list[Write], sites: list[Site], reader: Reader) -> Refusal | None:
        """Why layers have no site; None where all have one.

        Raises: NoAttentionSiteError: none has.
        """
        served = {site.cache for site in sites}
        missed = [write.node for write in writes if write.node not in served]
        if not missed:
            return None
        for softmax in Softmax.find(gm.graph):
            changed = changed_logits(softmax.node, reader.owners)
            if changed is not None:
                return Refusal(changed, module_path(softmax.node))
        if not sites:
            raise NoAttentionSiteError(
                "no attention site was found in the traced graph: load the model with attn_implementation='sdpa' (or "
                "'eager'); other attention functions are not recognised."
            )
        return Refusal("no attention was recognised that reads this layer's cache", module_path(missed[0]))


def shared(site: Site, owner: Site) -> Site:
    """A site that reads its owner's cache.

    Raises: Refusal: not as the owner does.
    """
    if site.module == owner.module:
        raise Refusal("a second attention reads this layer's cache", site.module)
    if site.span != owner.span or site.heads_apart != owner.heads_apart:
        raise Refusal(f"it reads the cache of {owner.module} with {site.span}, and that with {owner.span}", site.module)
    if value(site.query).shape[2] != value(owner.query).shape[2]:  # Gemma 4: those of whom logits are wanted
        raise Refusal(f"the last rows alone are computed, over the cache of {owner.module}", site.module)
    return dataclasses.replace(site, reads=owner.module)


def key_of(write: Write) -> fx.Node:
    """What attention reads of a written layer: the new key itself (prefill), or the storage (decode)."""
    return shown(write, write.keys) if isinstance(write, AppendKv) else write.key


def value_of(write: Write) -> fx.Node:
    return shown(write, write.values) if isinstance(write, AppendKv) else write.value


def shown(append: AppendKv, storage: fx.Node) -> fx.Node:
    """The storage, or what is shown of it where KV heads have budgets of their own: other layers may lie in it too."""
    if append.offsets is None:
        return storage
    views = [view for user in append.offsets.users if (view := ShowHeads.match(user)) is not None]
    return next(view.node for view in views if view.storage is storage)


class Reader:
    """Reads attention sites of one graph. `owners`: what attention reads -> the cache write that it belongs to."""

    def __init__(self, owners: dict[fx.Node, Write], facts: Facts) -> None:
        self.owners, self.inputs, self.spans, self.weights = owners, *map(facts.get, (Inputs, Spans, Weights))
        # Both cached tensors of each write: a latent and a rotary part (MLA) are no key and no value yet.
        self.sources = {node: write for write in owners.values() for node in (key_of(write), value_of(write))}
        self.asked = facts.get(RotationAsked)
        self.hidden: set[fx.Node] | None = None
        self.masks: dict[fx.Node, Span | str] = {}  # a model has one mask for many layers
        spans: tuple[Span | None, ...] = (FULL,) * len(owners) if self.spans is None else self.spans.layers
        holding = (index for index, span in enumerate(spans) if span is not None)  # the others write no cache
        self.layers = dict(zip((write.node for write in owners.values()), holding, strict=False))

    def read(self, attention: Sdpa | ModifiedAttention) -> Site | None:
        """The site, or None for attention over something that is not cached.

        Raises: Refusal: it reads a cache in a way that is not understood.
        """
        module = module_path(attention.node)
        write, apart, made = self._cached(attention, module)
        if write is None:
            return None
        if isinstance(attention, Sdpa) and attention.dropout_p:
            raise Refusal(f"attention dropout {attention.dropout_p} is on", module)
        layer, budget = (write.layer, write.budget) if isinstance(write, Fill) else (self.layers[write.node], 0)
        alibi = self._alibi(attention, write, module)
        span = self._span(attention, write, layer, module, alibi)
        heads, kv_heads = value(attention.query).shape[1], value(attention.key).shape[1]
        if heads % kv_heads:
            raise Refusal(f"{heads} query heads are no multiple of {kv_heads} KV heads", module)
        softcap, sinks, scale = 0.0, None, attention.scale
        if isinstance(attention, ModifiedAttention):
            softcap, sinks = attention.softcap, attention.sinks
        if scale is None:
            scale = 1.0 / math.sqrt(value(attention.query).shape[-1])
        return Site(
            layer,
            module,
            query=attention.query,
            key=attention.key,
            value=attention.value,
            cache=write.node,
            attention=attention.node,
            scale=float(scale),
            softcap=softcap,
            sinks=sinks,
            budget=span.positions or budget,
            span=span,
            alibi=alibi,
            heads_apart=apart,
            made=made,
            rotation=self._rotation(attention, write) if not (made or span.positions) else None,
        )

    def _cached(self, attention: Sdpa | ModifiedAttention, module: str) -> tuple[Write | None, bool, bool]:
        """The write of the cache that attention reads, None where it reads none, whether its heads stay apart, and
        whether attention reads what is made of it.

        Raises: Refusal: keys or values are not made of what is cached, column by column.
        """
        key, val = (self._stored(node) for node in (attention.key, attention.value))
        write = self.owners.get(key)
        if write is not None and value_of(write) in (skip_full_slices(attention.value), val):
            return write, True, False
        if write is None and not any(reads(attention.key, node) for node in self.owners):
            return None, True, False
        apart, found = True, set[fx.Node]()
        for name, node in (("keys", attention.key), ("values", attention.value)):
            made = Made.of(node, self._is_source)
            try:
                if made is None or not made.keeps_apart(LENGTH):
                    raise Refusal(f"{name} change between the cache and attention", module)
                apart = apart and made.keeps_apart(HEADS)
            except RuntimeError as error:
                raise Refusal(f"{name} change between the cache and attention ({error})", module) from error
            writes = [self.sources[self._stored(source)] for source in made.sources]
            found |= {made_by.node for made_by in writes}
        if len(found) != 1:
            raise Refusal("keys and values are made of several layers' caches", module)
        return writes[0], apart, True

    def _is_source(self, node: fx.Node) -> bool:
        """Whether it is a layer's cached keys or values [B, K, T, D]."""
        write = self.sources.get(self._stored(node))
        val = node.meta.get("val")
        return write is not None and val.dim() == 4 and val.shape[1] == value(write.key).shape[1]

    def _stored(self, node: fx.Node) -> fx.Node:
        """The cache tensor behind full slices and, where it is none yet, behind views of it."""
        plain = skip_full_slices(node)
        return plain if plain in self.sources else storage_of(plain)

    def _alibi(self, attention: Sdpa | ModifiedAttention, write: Write, module: str) -> Alibi | None:
        """The bias that the site's mask adds for each key's position, or None.

        Raises: Refusal: a step after a prompt whose attention said otherwise.
        """
        mask = mask_of(attention)
        alibi = None if mask is None else read_alibi(mask, value(attention.query).shape[1])
        if not isinstance(write, AppendKv):
            return alibi
        known = write.positions is not None
        if write.handle is not None and known != (alibi is not None):  # a draft's step has no handle
            raise Refusal("a bias is added to the attention logits of the prompt or of later tokens alone", module)
        return None if alibi is None else dataclasses.replace(alibi, positions=write.positions)

    def _rotation(self, attention: Sdpa | ModifiedAttention, write: Write) -> Rotation | str | None:
        """How the site's new queries and keys turn, where that is asked for.

        A prompt's positions are counted where it is told none, and then they tell nothing: its steps say it.
        """
        if self.asked is None or self.inputs is None:
            return None
        if not isinstance(write, AppendKv) and self.inputs.positions is None:
            return None
        if self.hidden is None:
            self.hidden = hidden_nodes(write.node.graph, self.inputs)
        return read_rotation(attention.query, write.key, self.hidden, self.weights, self.asked.context)

    def _span(
        self, attention: Sdpa | ModifiedAttention, write: Write, layer: int, module: str, alibi: Alibi | None
    ) -> Span:
        """What the site's queries read: by its mask, and where that cannot tell, by the config.

        Raises: Refusal: the mask is not understood, or is not what the config says.
        """
        said = None if self.spans is None else self.spans.layers[layer]
        if isinstance(write, AppendKv):
            return said or FULL  # a mask in slot coordinates tells nothing; lengths and the prefill's span tell all
        if value(attention.query).shape[2] == 1:  # a prompt of one token reads itself, whatever is added to its logit
            return said or FULL
        found = self._by_mask(attention, alibi)
        if isinstance(found, str):
            raise Refusal(f"attention mask: {found}", module)
        if said is None or found.positions or not said.positions:
            return found
        if at_most(value(attention.query).shape[2], said.positions):  # a prompt that fits a window needs no mask of it
            return said
        raise Refusal(f"configured as {said}, and its mask is that of {found}", module)

    def _by_mask(self, attention: Sdpa | ModifiedAttention, alibi: Alibi | None) -> Span | str:
        mask = mask_of(attention)
        if mask is None:
            return FULL if isinstance(attention, Sdpa) and attention.is_causal else "none"
        if mask not in self.masks:
            self.masks[mask] = mask_span(mask, self.inputs, self.weights, alibi)
        return self.masks[mask]


def mask_of(attention: Sdpa | ModifiedAttention) -> fx.Node | None:
    return attention.attn_mask if isinstance(attention, Sdpa) else attention.mask


def at_most(size: int | torch.SymInt, bound: int) -> bool:
    """Whether a size is known to be no more than `bound`, by the guards of its graph."""
    if not isinstance(size, torch.SymInt):
        return size <= bound
    return bool(size.node.shape_env.bound_sympy(size.node.expr).upper <= bound)


def storage_of(node: fx.Node) -> fx.Node:
    """The cache tensor behind views of it."""
    node = skip_full_slices(node)
    while True:
        view, wide = View.match(node), Widen.match(node)
        if view is not None:
            node = view.input
        elif wide is not None:
            node = wide.storage
        else:
            return node


def reads(key: fx.Node, node: fx.Node) -> bool:
    """Whether an attention's key comes from `node` within its own layer (a few operators back)."""
    frontier, seen = [key], set()
    for _ in range(12):
        following = []
        for current in frontier:
            if current is node:
                return True
            if current not in seen:
                seen.add(current)
                following.extend(current.all_input_nodes)
        frontier = following
    return False
