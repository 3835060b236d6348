"""annotate: write down query, key, value, cache write, mask and scale of every attention site.

The graph stays as it is. Refuses the whole model, with the site's module path, where one site is not understood:
then the model runs exactly.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import fx

from specpass.dialect.cache import Fill
from specpass.dialect.define import SPEC
from specpass.errors import NoAttentionSiteError
from specpass.graph.walk import ATEN, VIEWS, find, is_op, module_path, skip_full_slices, value
from specpass.passes.base import Pass, Refusal, Site, State
from specpass.passes.read.logits import changed_logits
from specpass.passes.read.masks import mask_class

CACHE_OPS = (SPEC.fill, SPEC.append_kv, SPEC.keep_kv)


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    name: ClassVar[str] = "annotate"
    stage: ClassVar[str] = "TRACED"

    def run(self, gm: fx.GraphModule, state: State) -> None:
        writes = find(gm.graph, *CACHE_OPS)
        owners: dict[fx.Node, fx.Node] = {}
        for write in writes:
            owners[write.args[0]] = write  # prefill: attention reads the key itself; decode: the storage
        classes: dict[Any, str] = {}
        for attention in find(gm.graph, ATEN.scaled_dot_product_attention, SPEC.modified_attention):
            site = describe(attention, owners, state, classes)
            if site is not None:
                state.sites.append(site)
        served = {site.cache for site in state.sites}
        if any(write not in served for write in writes):
            for softmax in find(gm.graph, ATEN.softmax, ATEN._softmax):
                changed = changed_logits(softmax, owners)
                if changed is not None:
                    raise Refusal(changed, module_path(softmax))
        if not state.sites and writes:
            raise NoAttentionSiteError(
                "no attention site was found in the traced graph: load the model with attn_implementation='sdpa' (or "
                "'eager'); other attention functions are not recognised."
            )
        for write in writes:
            if write not in served:
                raise Refusal("no attention was recognised that reads this layer's cache", module_path(write))


def describe(attention: fx.Node, owners: dict, state: State, classes: dict) -> Site | None:
    softcap, sinks, dropout, causal = 0.0, None, 0.0, False
    if is_op(attention, SPEC.modified_attention):
        query, key, val, mask, scale, softcap, sinks = attention.args
    else:
        given = list(attention.args)
        query, key, val, mask, dropout, causal = given + [None, 0.0, False][len(given) - 3 :]
        scale = attention.kwargs.get("scale")
        scale = 1.0 / math.sqrt(value(query).shape[-1]) if scale is None else scale
    module = module_path(attention)
    key, val = (node if node in owners else storage_of(node) for node in map(skip_full_slices, (key, val)))
    write = owners.get(key)
    if write is None:
        if any(reads(attention, node) for node in owners):
            raise Refusal("keys change between the cache and attention", module)
        return None  # attention over something that is not cached (no site of ours)
    if write.args[1] not in (skip_full_slices(attention.args[2]), val):
        raise Refusal("values change between the cache and attention", module)
    if dropout:
        raise Refusal(f"attention dropout {dropout} is on", module)
    if is_op(write, SPEC.append_kv):
        label = "lengths"  # whatever mask the model built in slot coordinates, lengths say it exactly
    elif mask is not None:
        if mask not in classes:
            classes[mask] = mask_class(mask, state.inputs)
        label = classes[mask]
    else:
        label = "causal" if causal else "none"
    if label not in ("causal", "lengths"):
        raise Refusal(f"attention mask: {label}", module)
    heads, kv_heads = value(query).shape[1], value(write.args[3 if label == "lengths" else 0]).shape[1]
    if heads % kv_heads:
        raise Refusal(f"{heads} query heads are no multiple of {kv_heads} KV heads", module)
    layer = Fill.of(write).layer if is_op(write, SPEC.fill) else len(state.sites)
    site = Site(
        layer,
        module,
        query,
        attention.args[1],
        attention.args[2],
        write,
        attention,
        float(scale),
        label,
        softcap,
        sinks,
    )
    if is_op(write, SPEC.fill):
        site.budget = Fill.of(write).budget
    return site


def storage_of(node: Any) -> Any:
    """The cache tensor behind views of it."""
    node = skip_full_slices(node)
    while is_op(node, *VIEWS, SPEC.widen):
        node = node.args[0]
    return node


def reads(attention: fx.Node, node: fx.Node) -> bool:
    """Whether the attention's key comes from `node` within its own layer (a few operators back)."""
    frontier, seen = [attention.args[1]], set()
    for _ in range(12):
        following = []
        for current in frontier:
            if current is node:
                return True
            if isinstance(current, fx.Node) and current not in seen:
                seen.add(current)
                following.extend(current.all_input_nodes)
        frontier = following
    return False
