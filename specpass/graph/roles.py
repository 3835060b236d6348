"""A graph's inputs by their role: token ids, mask, positions."""

from __future__ import annotations

import re

import torch
from torch import fx

# The order in which Hugging Face decoders take them, for callers that pass them by position.
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


def role_of(name: str) -> str | None:
    """input_ids, attention_mask, position_ids or inputs_embeds; None for weights, sizes and the cache."""
    if found := _BY_NAME.search(name):
        return found.group(1)
    if (found := _BY_ORDER.search(name)) and int(found.group(1)) < len(ROLES):
        return ROLES[int(found.group(1))]
    return None


def named_inputs(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Prompt inputs [B, S] by role; a mask that is not 2-D has no role."""
    found: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        role = role_of(node.meta.get("specpass_source", ""))
        val = node.meta.get("val")
        if role == "inputs_embeds" or (role and isinstance(val, torch.Tensor) and val.dim() == 2):
            found[role] = node
    return found
