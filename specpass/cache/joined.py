"""A layer's slots as one tensor, where they lie in parts: copies, for those who look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specpass.kernels.bits.reference import dequantize, layout_of

if TYPE_CHECKING:
    from specpass.cache.layer import Storage


def joined(layer: Storage, name: str, buffer: Tensor | None) -> Tensor:
    """[B, K, C + N, D] keys or values of a prompt that lies apart, in the model's dtype, and right behind it what
    follows."""
    assert layer.key_buffer is not None
    assert layer.value_buffer is not None
    behind = layer.stored(buffer)
    assert behind is not None
    if layer.prompt is not None:
        states, counts = layer.prompt[name == "value"], layer.prompt[2]
        if layer.prompt_starts is not None:
            states = by_head(states, layer.prompt_starts, counts, 0)
        prompt, counts = layer.by_row(states), layer.by_row(counts)
    else:
        assert layer.quantized is not None
        codes, counts, basis = layer.quantized
        layout = layout_of(layer.key_buffer, layer.value_buffer, layer.bits)
        prompt = dequantize(codes, basis, layout, name, behind.dtype).to(behind.dtype)
    assert layer.kept_positions is not None
    size = prompt.shape[2] if layer.prompt is not None else layer.kept_positions.shape[2]
    slot = torch.arange(size + behind.shape[2], device=counts.device)
    place = torch.where(slot < counts[..., None], slot, prompt.shape[2] + slot - counts[..., None])
    both = torch.cat([prompt, behind], 2)
    inside = place < both.shape[2]
    found = both.gather(2, place.clamp(max=both.shape[2] - 1)[..., None].expand(-1, -1, -1, both.shape[3]))
    return found.masked_fill(~inside[..., None], 0)


def by_head(flat: Tensor, starts: Tensor, counts: Tensor, unused: int, most: int | None = None) -> Tensor:
    """[B, T, ...] of which head k has `counts` [B, K] items from `starts` [B, K] on -> [B, K, M, ...], a copy.

    Args: most: M, as many as the longest head has unless told.
    """
    slot = torch.arange(int(counts.max()) if most is None else most, device=flat.device)
    inside = slot < counts[..., None]
    row = torch.arange(flat.shape[0], device=flat.device)[:, None, None]
    found = flat[row, torch.where(inside, starts[..., None] + slot, 0)]
    return found.masked_fill(~inside.reshape(*inside.shape, *[1] * (flat.dim() - 2)), unused)
