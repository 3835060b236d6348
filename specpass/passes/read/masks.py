"""What an attention mask means, found by evaluating its subgraph at a few small sizes.

A mask's shape tells nothing, so its part of the graph is run on real tensors for small (B, S, padding) and compared
with the masks that specpass understands: causal, and within it a sliding window or chunks. Anything else is refused.

A window of 4,096 would show at prompts beyond it only. So numbers that positions are compared with or divided by are
made small while the subgraph runs (4,096 becomes 2, say), and what is found is named by the number that stood there.

All of it happens on the CPU, wherever the model lives: what a mask means does not depend on it.

A mask may add a bias of the keys besides (ALiBi, read in alibi.py): then it must be that bias and a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from specpass.graph.roles import role_of
from specpass.graph.walk import ATEN, ancestors, is_op, value
from specpass.passes.facts import Inputs, Weights
from specpass.passes.read.alibi import adds
from specpass.rewrite.sites import Alibi
from specpass.sizes import FULL, Span

Trial = tuple[int, tuple[int, ...]]
TRIALS: tuple[Trial, ...] = ((6, (0, 0)), (7, (0, 3)), (5, (2, 1)))  # prompt length, left padding of each row
ROUNDED: Trial = (320, (0,))  # a bias of 16 bits is rounded from position 257 on
LOWEST = torch.finfo(torch.float16).min / 64  # what is added below this hides
LEAST = 7  # a window from here on shows in no trial
SMALL = (2, 3, 4)  # what numbers from LEAST on become, in their order
COMPARED = (ATEN.sub, ATEN.add, ATEN.gt, ATEN.ge, ATEN.lt, ATEN.le, ATEN.floor_divide, ATEN.div)


def mask_span(
    mask: fx.Node, inputs: Inputs | None, weights: Weights | None = None, alibi: Alibi | None = None
) -> Span | str:
    """What a query reads by this mask (causal, padding included), or why the mask is not understood.

    Args:
        weights: the model's tensors, among which are the masks that it keeps as buffers (GPT-Neo).
        alibi: the bias that the mask adds.
    """
    if inputs is None or (inputs.ids is None and inputs.embeds is None):
        return "unknown: it is made of no token ids"
    subgraph = _Subgraph(mask, inputs, weights)
    stranger = subgraph.stranger()
    if stranger is not None:
        return f"unknown: the mask depends on the input {stranger.name}"
    numbers = subgraph.numbers()
    if len(numbers) > len(SMALL):
        return f"unknown: positions are compared with {numbers}"
    small = dict(zip(numbers, SMALL, strict=False))
    trials: tuple[Trial, ...] = TRIALS
    bounds = tuple(range(1, LEAST))
    if subgraph.known:  # a window in a buffer shows at the buffer's own size
        length = min(known.shape[-1] for known in subgraph.known.values())
        trials, bounds = ((length, (0, 0)), *TRIALS), (*bounds, *subgraph.widths(length))
    if alibi is not None and {alibi.dtype, value(alibi.slopes).dtype} != {torch.float32}:
        trials = (*trials, ROUNDED)
    possible: set[Span] | None = None
    for length, pads in trials:
        real = subgraph.tokens(length, pads)
        try:
            values = subgraph.run(real, small)
        except Exception as error:  # the subgraph holds an operator that real tensors of this size cannot run
            return f"unknown: its subgraph does not evaluate ({type(error).__name__})"
        got = values[mask]
        if got.dim() != 4:
            return f"unknown: shape {tuple(got.shape)}"
        spans = _spans(got, real, bounds, None if alibi is None else (alibi, values[alibi.slopes]))
        possible = spans if possible is None else possible & spans
    if not possible:
        if got.is_floating_point() and bool(((got > LOWEST) & (got != 0)).any()):
            return "unknown: it adds a bias to the logits that is no slope of a head times the key's position"
        return "unknown: neither causal nor a sliding window nor chunks"
    if FULL in possible:
        return FULL
    found = min(possible, key=lambda span: span.positions)
    named = {number: name for name, number in small.items()}.get(found.positions, found.positions)
    return Span(sliding=named) if found.sliding else Span(chunk=named)


class _Subgraph:
    """What a mask is computed from, and its value for given tokens."""

    def __init__(self, mask: fx.Node, inputs: Inputs, weights: Weights | None) -> None:
        self.mask, self.inputs, self.needed = mask, inputs, ancestors(mask)
        named = {inputs.ids, inputs.mask, inputs.positions, inputs.embeds}
        tensors = {} if weights is None else weights.tensors
        own = [node for node in self.needed if node in tensors and node not in named and not is_argument(node)]
        self.known = {node: tensors[node].cpu() for node in own if tensors[node].dtype == torch.bool}
        self.free = [n for n in self.needed if n.op == "placeholder" and n not in named and n not in self.known]
        self.shape = value(inputs.tokens).shape[:2]
        given = [value(node).shape[:2] for node in (inputs.mask, inputs.positions) if node is not None]
        sizes = [axis_of for shape in (self.shape, *given) for axis_of in enumerate(shape)]  # Dynamo may name one twice
        self.sizes = {str(size): axis for axis, size in sizes if isinstance(size, torch.SymInt)}

    def stranger(self) -> fx.Node | None:
        """An input that is neither the prompt's nor a size of it."""
        for node in self.free:
            val = value(node)
            known = isinstance(val, torch.SymInt) and (not val.node.expr.free_symbols or str(val) in self.sizes)
            if not known:
                return node
        return None

    def numbers(self) -> list[int]:
        """Numbers that positions are compared with or divided by, and that no trial would reach."""
        found = set()
        for node in self.needed:
            if is_op(node, *COMPARED):
                found |= {abs(arg) for arg in node.args if type(arg) is int and abs(arg) >= LEAST}
        return sorted(found)

    def widths(self, length: int) -> set[int]:
        """How many columns a buffer lets its last row of `length` see: the window that it may hold."""
        return {int(known[..., length - 1, :length].sum(-1).max()) for known in self.known.values()} - {length}

    def tokens(self, length: int, pads: tuple[int, ...]) -> Tensor:
        """[B, length] int64: 1 where a token is real."""
        batch = len(pads) if isinstance(self.shape[0], torch.SymInt) else int(self.shape[0])
        real = torch.ones(batch, length, dtype=torch.int64)
        given = self.inputs.mask
        if given is not None and given.users:  # an export knows of padding that its model was not told of
            for row, pad in enumerate(pads[:batch]):
                real[row, :pad] = 0
        return real

    def run(self, real: Tensor, small: Mapping[int, int]) -> dict[fx.Node, Any]:
        """Values of the nodes for these tokens, with each number of `small` in its small form."""
        env: dict[fx.Node, Any] = dict(self.known)
        for node in self.free:
            size = str(value(node))
            env[node] = real.shape[self.sizes[size]] if size in self.sizes else int(value(node))
        for node, feed in (
            (self.inputs.ids, torch.zeros_like(real)),
            (self.inputs.embeds, real[..., None].float()),
            (self.inputs.positions, (real.cumsum(1) - 1).clamp(min=0)),
        ):
            if node is not None:
                env[node] = feed
        if self.inputs.mask is not None:
            env[self.inputs.mask] = real.to(value(self.inputs.mask).dtype)
        for node in self.needed:
            if node.op == "get_attr":
                env[node] = getattr(node.graph.owning_module, str(node.target)).cpu()
            elif node not in env:
                args, kwargs = fx.map_arg(tree_map(on_cpu, (node.args, dict(node.kwargs))), lambda n: env[n])
                if is_op(node, *COMPARED):
                    args = tuple(made_small(arg, small) for arg in args)
                env[node] = node.target(*args, **kwargs)
        return env


def is_argument(node: fx.Node) -> bool:
    """Whether an input is one of the call's, in whatever shape, and no buffer of the model."""
    return role_of(node.meta.get("specpass_source", "")) is not None


def on_cpu(argument: Any) -> Any:
    """An operator's argument, or the CPU in a device's place."""
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def made_small(arg: Any, small: Mapping[int, int]) -> Any:
    """A number's small form, with its sign."""
    if type(arg) is not int or abs(arg) not in small:
        return arg
    return small[abs(arg)] if arg > 0 else -small[abs(arg)]


def _spans(mask: Tensor, real: Tensor, bounds: Iterable[int], bias: tuple[Alibi, Tensor] | None = None) -> set[Span]:
    """All spans by which a mask [B, 1, S, S] is right for tokens [B, S], among those of these bounds.

    Args: bias: what a mask [B, H, S, S] must add besides, and its slopes.
    """
    batch, length = real.shape
    # A mask that is scaled is one, too. With a bias in float32, it may hide by the lowest number of float16.
    lowest = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 64 if bias is None else LOWEST
    allowed = mask if mask.dtype == torch.bool else mask > lowest
    heads = 1 if bias is None else bias[1].numel()
    if allowed.shape[1] != heads or allowed.shape[2:] != (length, length):
        return set()
    if bias is not None and bool((allowed != allowed[:, :1]).any()):
        return set()
    allowed = allowed[:, :1].expand(batch, 1, length, length)
    rows = (real != 0)[:, None, :, None].expand_as(allowed)  # what padding rows see does not matter
    position = (real.cumsum(1) - 1)[:, None]  # [B, 1, S]
    row, column = position[..., :, None], position[..., None, :]
    seen = rows & (real != 0)[:, None, None, :]
    if bias is not None and not adds(*bias, mask, position[:, 0], allowed & seen):
        return set()
    candidates = {FULL, *(Span(sliding=bound) for bound in bounds), *(Span(chunk=bound) for bound in bounds)}
    return {span for span in candidates if torch.equal(allowed & rows, span.reads(row, column) & seen)}
