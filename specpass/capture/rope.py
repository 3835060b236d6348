"""Rotary embeddings whose frequencies follow the sequence's length keep them in their module, from call to call.

Long-rope (arXiv 2402.13753) has two sets of frequencies, and which one serves is a question of the highest position;
dynamic NTK makes them anew for each length, which takes a look at that position in the middle of the forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

FOLLOWING = ("dynamic", "longrope")


def rope_types(module: nn.Module) -> set[str]:
    """Of a rotary embedding, which may have one for each kind of layer; empty for other modules."""
    found = getattr(module, "rope_type", None)
    return set(found.values()) if isinstance(found, dict) else {found} if isinstance(found, str) else set()


def following(model: nn.Module) -> set[str]:
    """Rope types of `model` by which its frequencies follow the length."""
    return {kind for module in model.modules() for kind in rope_types(module) if kind in FOLLOWING}


def why_not_fixed(config: Any) -> str:
    """Why the frequencies of a model with this config follow the length; "" where they are the same at every length."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [own for own in (said, *said.values()) if isinstance(own, dict)]  # there may be one for each kind of layer
    named = [own.get("rope_type", own.get("type")) for own in each]
    kinds = [kind for kind in FOLLOWING if kind in named]
    return f"its rotary frequencies follow the length: rope_type {'/'.join(kinds)}" if kinds else ""


def prepare_rope(model: nn.Module) -> None:
    """Let long-rope make its second set of frequencies now: in a trace it costs a graph, or breaks one."""
    for module in model.modules():
        kinds = module.rope_type if isinstance(getattr(module, "rope_type", None), dict) else {None: ""}
        if "longrope" not in rope_types(module):
            continue
        device = next(module.buffers()).device  # weights may be offloaded
        for layer_type in kinds:
            named = {} if layer_type is None else {"layer_type": layer_type}
            position = torch.zeros(1, 1, dtype=torch.int64, device=device)
            module(torch.zeros(1, 1, 1, device=device), position_ids=position, **named)


@contextlib.contextmanager
def rope_as_it_was(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves no trace in frequencies that follow the length: tokens that do not stay, fake tensors."""
    saved = [(module, state_of(module)) for module in model.modules() if rope_types(module) & set(FOLLOWING)]
    try:
        yield
    finally:
        for module, (attributes, buffers) in saved:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            module._buffers.clear()
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.copy_(values)


def state_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes, and buffers with a copy of their values: some are written in place."""
    buffers = {name: (held, None if held is None else held.clone()) for name, held in module._buffers.items()}
    return dict(module.__dict__), buffers
