"""What a site's mask means, from its values: causal with the prompt's padding, or a reason why the site stays exact."""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.interpret.watch import Attention
from specpass.sizes import Span


class Masks:
    """Reads each mask of a prompt once.

    Args: real: [B, S] bool, which tokens are no padding, None: all. blocks: an image's tokens may see each other.
    """

    def __init__(self, real: Tensor | None, *, blocks: bool = False) -> None:
        self.real, self.blocks = real, blocks
        self.known: dict[tuple[int, Span], tuple[Tensor, str]] = {}

    def meaning(self, call: Attention, mask: Tensor | None, span: Span) -> str:
        """ "" where attention of a prompt's (last) rows is causal, reads `span`, hides padding; else what it is.

        Args: mask: the call's, or what that one is a copy of, on another device.
        """
        count, rows = call.key.shape[2], call.query.shape[2]
        if count == 1:  # one token sees itself
            return ""
        if mask is None:
            if self.real is not None:
                return "its attention reads padding"
            if span.positions and span.positions < count:
                return f"configured as {span}, and its attention has no mask"
            causal = call.is_causal if rows == count else rows == 1  # the last row sees all
            return "" if causal else "attention mask: none"
        if call.is_causal:
            return "a mask beside is_causal"
        key = (id(mask), span)
        if key not in self.known:
            self.known[key] = (mask, difference(mask, self.real, rows, count, span, self.blocks))
        return self.known[key][1]


def difference(mask: Tensor, real: Tensor | None, rows: int, count: int, span: Span, blocks: bool = False) -> str:
    """ "" where a mask [B or 1, 1, R, S] (bool, or added to the logits) is causal for the last R of S tokens."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (rows, count):
        return f"attention mask of shape {tuple(mask.shape)}, which is not [B, 1, {rows}, {count}]"
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask.masked_fill(~allowed, 0) != 0).any()):
            return "its mask adds a bias to the logits"
    seen = torch.ones(1, count, dtype=torch.bool, device=mask.device) if real is None else real.to(mask.device)
    position = (seen.long().cumsum(1) - 1)[:, None]
    expected = span.reads(position[..., -rows:, None], position[..., None, :])
    if real is not None:
        expected = expected & seen[:, None, None, :]
        own = seen[:, None, -rows:, None]  # what padding rows see does not matter
        allowed, expected = allowed & own, expected & own
    if bool((allowed == expected).all()) or (blocks and rows == count and reads_blocks(allowed, expected)):
        return ""
    return f"its mask is not that of {span}, as configured"


def reads_blocks(allowed: Tensor, expected: Tensor) -> bool:
    """Whether masks [B, 1, S, S] differ only in that some tokens see each other both ways (those of an image).

    What comes behind the prompt reads as the last row does, so that one must be as expected.
    """
    allowed, expected = torch.broadcast_tensors(allowed, expected)
    if bool((expected & ~allowed).any()) or not torch.equal(allowed[:, :, -1], expected[:, :, -1]):
        return False
    more = allowed & ~expected
    return bool((more.tril() <= more.triu(1).mT).all())  # less than is not implied
