"""What an attention mask means, found by evaluating its subgraph at a few small sizes.

A mask's shape tells nothing, so its part of the graph is run on real tensors for small (B, S, padding) and compared
with the masks that specpass understands. Anything else is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from specpass.graph.walk import ancestors, value


def mask_class(mask: fx.Node, inputs: dict[str, fx.Node]) -> str:
    """ "causal" (padding included), "sliding window W", or "unknown: reason"."""
    needed = ancestors(mask)
    sources = {node: name for name, node in inputs.items()}
    free = [node for node in needed if node.op == "placeholder" and node not in sources]
    ids_value = value(inputs["input_ids"])
    sizes = {str(size): axis for axis, size in enumerate(ids_value.shape) if isinstance(size, torch.SymInt)}
    for node in free:
        if not isinstance(value(node), torch.SymInt) or (
            not _is_constant(value(node)) and str(value(node)) not in sizes
        ):
            return f"unknown: the mask depends on the input {node.name}"
    given = inputs.get("attention_mask")
    masked = given is not None and bool(given.users)  # an export knows of padding that its model was not told of
    window: set[int] = set()
    for length, pads in ((6, (0, 0)), (7, (0, 3)), (5, (2, 1))):
        batch = len(pads) if isinstance(ids_value.shape[0], torch.SymInt) else int(ids_value.shape[0])
        real = torch.ones(batch, length, dtype=torch.int64)
        if masked:
            for row, pad in enumerate(pads[:batch]):
                real[row, :pad] = 0
        feeds: dict[fx.Node, Any] = {}
        for node in free:
            feeds[node] = (batch, length)[sizes[str(value(node))]] if str(value(node)) in sizes else int(value(node))
        for node, name in sources.items():
            feeds[node] = _feed(name, node, real)
        try:
            got = _run(mask, needed, feeds)
        except Exception as error:  # the subgraph holds an operator that real tensors of this size cannot run
            return f"unknown: its subgraph does not evaluate ({type(error).__name__})"
        allowed = got if got.dtype == torch.bool else got > torch.finfo(got.dtype).min / 2
        if allowed.dim() != 4:
            return f"unknown: shape {tuple(got.shape)}"
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        expected = causal & (real != 0)[:, None, None, :]
        rows = (real != 0)[:, None, :, None].expand_as(expected)  # what padding rows see does not matter
        allowed = allowed.expand(batch, 1, length, length) if allowed.shape[1] == 1 else allowed
        if allowed.shape[1] != 1 or not torch.equal(allowed & rows, expected & rows):
            window.add(_window_of(allowed, expected, rows))
    if not window:
        return "causal"
    return "unknown: neither causal nor a sliding window" if 0 in window else f"sliding window {min(window)}"


def _is_constant(size: torch.SymInt) -> bool:
    return not size.node.expr.free_symbols


def _feed(name: str, node: fx.Node, real: Tensor) -> Tensor:
    if name == "attention_mask":
        return real.to(value(node).dtype)
    if name == "position_ids":
        return (real.cumsum(1) - 1).clamp(min=0)
    return torch.zeros_like(real)


def _run(mask: fx.Node, needed: list[fx.Node], feeds: dict[fx.Node, Any]) -> Tensor:
    env: dict[fx.Node, Any] = {}
    for node in needed:
        if node in feeds:
            env[node] = feeds[node]
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
        env[node] = node.target(*args, **kwargs)
    return env[mask]


def _window_of(allowed: Tensor, expected: Tensor, rows: Tensor) -> int:
    """Smallest window whose mask equals `allowed`, or 0."""
    length = allowed.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    for window in range(1, length):
        if torch.equal(allowed & rows, expected & (distance < window) & rows):
            return window
    return 0
