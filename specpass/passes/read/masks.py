"""What an attention mask means, found by evaluating its subgraph at a few small sizes.

A mask's shape tells nothing, so its part of the graph is run on real tensors for small (B, S, padding) and compared
with the masks that specpass understands. Anything else is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from specpass.graph.walk import ancestors, value
from specpass.passes.facts import Inputs, Weights

TRIALS = ((6, (0, 0)), (7, (0, 3)), (5, (2, 1)))  # prompt length, left padding of each row


def mask_class(mask: fx.Node, inputs: Inputs | None, weights: Weights | None = None) -> str:
    """ "causal" (padding included), "sliding window W", or "unknown: reason".

    Args: weights: the model's tensors, among which are the masks that it keeps as buffers (GPT-Neo).
    """
    if inputs is None or (inputs.ids is None and inputs.embeds is None):
        return "unknown: it is made of no token ids"
    subgraph = _Subgraph(mask, inputs, weights)
    stranger = subgraph.stranger()
    if stranger is not None:
        return f"unknown: the mask depends on the input {stranger.name}"
    windows: set[int] = set()
    for length, pads in TRIALS:
        real = subgraph.tokens(length, pads)
        try:
            got = subgraph.run(real)
        except Exception as error:  # the subgraph holds an operator that real tensors of this size cannot run
            return f"unknown: its subgraph does not evaluate ({type(error).__name__})"
        if got.dim() != 4:
            return f"unknown: shape {tuple(got.shape)}"
        window = _difference(got, real)
        if window is not None:
            windows.add(window)
    if not windows:
        return "causal"
    return "unknown: neither causal nor a sliding window" if 0 in windows else f"sliding window {min(windows)}"


class _Subgraph:
    """What a mask is computed from, and its value for given tokens."""

    def __init__(self, mask: fx.Node, inputs: Inputs, weights: Weights | None) -> None:
        self.mask, self.inputs, self.needed = mask, inputs, ancestors(mask)
        named = {inputs.ids, inputs.mask, inputs.positions, inputs.embeds}
        tensors = {} if weights is None else weights.tensors
        own = [node for node in self.needed if node in tensors and node not in named]
        self.known = {node: tensors[node] for node in own if tensors[node].dtype == torch.bool}
        self.free = [n for n in self.needed if n.op == "placeholder" and n not in named and n not in self.known]
        self.shape = value(inputs.tokens).shape[:2]
        self.width = 1 if inputs.embeds is None else value(inputs.embeds).shape[2]
        self.sizes = {str(size): axis for axis, size in enumerate(self.shape) if isinstance(size, torch.SymInt)}

    def stranger(self) -> fx.Node | None:
        """An input that is neither the prompt's nor a size of it."""
        for node in self.free:
            val = value(node)
            known = isinstance(val, torch.SymInt) and (not val.node.expr.free_symbols or str(val) in self.sizes)
            if not known:
                return node
        return None

    def tokens(self, length: int, pads: tuple[int, ...]) -> Tensor:
        """[B, length] int64: 1 where a token is real."""
        batch = len(pads) if isinstance(self.shape[0], torch.SymInt) else int(self.shape[0])
        real = torch.ones(batch, length, dtype=torch.int64)
        given = self.inputs.mask
        if given is not None and given.users:  # an export knows of padding that its model was not told of
            for row, pad in enumerate(pads[:batch]):
                real[row, :pad] = 0
        return real

    def run(self, real: Tensor) -> Tensor:
        """The mask for these tokens."""
        env: dict[fx.Node, Any] = dict(self.known)
        for node in self.free:
            size = str(value(node))
            env[node] = real.shape[self.sizes[size]] if size in self.sizes else int(value(node))
        for node, feed in (
            (self.inputs.ids, torch.zeros_like(real)),
            (self.inputs.embeds, real[..., None].expand(-1, -1, self.width).float()),
            (self.inputs.positions, (real.cumsum(1) - 1).clamp(min=0)),
        ):
            if node is not None:
                env[node] = feed
        if self.inputs.mask is not None:
            env[self.inputs.mask] = real.to(value(self.inputs.mask).dtype)
        for node in self.needed:
            if node.op == "get_attr":
                env[node] = getattr(node.graph.owning_module, str(node.target))
            elif node not in env:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
        return env[self.mask]


def _difference(mask: Tensor, real: Tensor) -> int | None:
    """None where a mask [B, 1, S, S] is causal for tokens [B, S], else its window; 0: no window explains it."""
    batch, length = real.shape
    lowest = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 64  # a mask that is scaled is one, too
    allowed = mask if mask.dtype == torch.bool else mask > lowest
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    expected = causal & (real != 0)[:, None, None, :]
    rows = (real != 0)[:, None, :, None].expand_as(expected)  # what padding rows see does not matter
    allowed = allowed.expand(batch, 1, length, length) if allowed.shape[1] == 1 else allowed
    if allowed.shape[1] == 1 and torch.equal(allowed & rows, expected & rows):
        return None
    return _window_of(allowed, expected, rows)


def _window_of(allowed: Tensor, expected: Tensor, rows: Tensor) -> int:
    """Smallest window whose mask equals `allowed`, or 0."""
    length = allowed.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    for window in range(1, length):
        if torch.equal(allowed & rows, expected & (distance < window) & rows):
            return window
    return 0
