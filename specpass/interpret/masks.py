"""What a site's mask means, from its values: causal with the prompt's padding, or a reason why the site stays exact."""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.interpret.watch import Attention


class Masks:
    """Reads each mask of a prompt once; `real` [B, S] bool says which tokens are no padding, None: all."""

    def __init__(self, real: Tensor | None) -> None:
        self.real = real
        self.known: dict[int, tuple[Tensor, str]] = {}  # by identity; held, so that no other mask takes the id

    def meaning(self, call: Attention) -> str:
        """ "" where the attention of a prompt is causal and hides padding, else what it is."""
        mask, count = call.mask, call.key.shape[2]
        if count == 1:  # one token sees itself
            return ""
        if mask is None:
            if self.real is not None:
                return "its attention reads padding"
            return "" if call.is_causal else "attention mask: none"
        if call.is_causal:
            return "a mask beside is_causal"
        if id(mask) not in self.known:
            self.known[id(mask)] = (mask, difference(mask, self.real, count))
        return self.known[id(mask)][1]


def difference(mask: Tensor, real: Tensor | None, count: int) -> str:
    """ "" where a mask [B or 1, 1, S, S] (bool, or added to the logits) is causal for these tokens; else why not."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (count, count):
        return f"attention mask of shape {tuple(mask.shape)}, which is not [B, 1, {count}, {count}]"
    allowed = mask
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask.masked_fill(~allowed, 0) != 0).any()):
            return "its mask adds a bias to the logits"
    expected = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()[None, None]
    if real is not None:
        seen = real.to(mask.device)
        expected = expected & seen[:, None, None, :]
        rows = seen[:, None, :, None]  # what padding rows see does not matter
        allowed, expected = allowed & rows, expected & rows
    if bool((allowed == expected).all()):
        return ""
    return "its mask is not causal attention over the whole prompt (a sliding window, chunks, or the caller's own)"
