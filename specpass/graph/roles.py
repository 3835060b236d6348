"""A graph's inputs by their role: token ids, mask, positions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import fx

# The order in which most Hugging Face decoders take them, for callers that pass them by position.
ROLES = ("input_ids", "attention_mask", "position_ids")
_BY_NAME = re.compile(r"\['(input_ids|attention_mask|position_ids|inputs_embeds)'\]$")
_BY_ORDER = re.compile(r"\['args'\]\[(\d)\]$")


def source_name(node: fx.Node) -> str:
    """Where Dynamo read an input from, e.g. `L['kwargs']['input_ids']`."""
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


def role_of(name: str, order: Sequence[str] = ROLES) -> str | None:
    """input_ids, attention_mask, position_ids or inputs_embeds; None for weights, sizes and the cache.

    Args: order: names of the model's arguments, in their order.
    """
    if found := _BY_NAME.search(name):
        return found.group(1)
    if (found := _BY_ORDER.search(name)) and int(found.group(1)) < len(order):
        role = order[int(found.group(1))]
        return role if role in (*ROLES, "inputs_embeds") else None
    return None


def inputs_of(gm: fx.GraphModule, order: Sequence[str]) -> Iterator[tuple[str, fx.Node, int]]:
    """Inputs that have a role, with it and their number of axes; 0 axes where they are no tensor."""
    for node in gm.graph.find_nodes(op="placeholder"):
        role, val = role_of(node.meta.get("specpass_source", ""), order), node.meta.get("val")
        if role:
            yield role, node, val.dim() if isinstance(val, torch.Tensor) else 0


def named_inputs(gm: fx.GraphModule, order: Sequence[str] = ROLES) -> dict[str, fx.Node]:
    """Prompt inputs [B, S] by role; a mask that is not 2-D has no role. Args: order: as for `role_of`."""
    return {role: node for role, node, axes in inputs_of(gm, order) if role == "inputs_embeds" or axes == 2}


def has_axes(gm: fx.GraphModule, order: Sequence[str] = ROLES) -> bool:
    """Whether position ids come as [P, B, S], one for each of several axes. Args: order: as for `role_of`."""
    return any(role == "position_ids" and axes == 3 for role, _, axes in inputs_of(gm, order))
