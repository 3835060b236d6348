"""Several sequences of one prompt: its slots are stored once, and those behind them for each sequence.

A batch of B prompts becomes one of R = B * n sequences, of which a prompt's n stand side by side. Where sequences are
chosen anew (beams, particles) their own slots are moved, in place, and the prompts' stay where they are.

Symbols: B prompts, n sequences of each, K KV heads, C slots of a prompt, N of a sequence, D head dimension.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specpass.cache.layer import PROMPT, Storage, keep_marks

if TYPE_CHECKING:
    from specpass.cache.protocol import BudgetLayer

OF_PROMPT = (*PROMPT, "counts", "kept_positions")  # a layer's tensors that sequences share


def why_copied(layer: BudgetLayer) -> str:
    """Why a layer's prompt is copied for each sequence; "" where they share it."""
    if layer.exact or layer.cache.exact:
        return "everything is kept, in the model's own columns"
    if layer.quantized is not None:
        return "the prompt is quantised"
    if layer.made:
        return "attention reads what is made of cached keys"
    if layer.biased:
        return "a bias is added by the positions of the keys (ALiBi)"
    if layer.cache.bound is not None and not layer.is_full:
        return "a window's slots move on where generated tokens are bounded"
    if layer.cache.bound is not None and layer.cache.bound.shared:
        return "evictions choose among the prompt's slots"
    return ""


def share(layer: BudgetLayer) -> None:
    """Lay a prompt's slots apart from those behind them, which then can be repeated."""
    if layer.starts is not None:
        _share_ragged(layer)
        return
    assert layer.kept_positions is not None
    counts = (layer.kept_positions >= 0).sum(-1)
    size = layer.kept_positions.shape[2]
    states: list[Tensor] = []
    for buffer in (layer.key_buffer, layer.value_buffer):
        stored = layer.stored(buffer)
        assert stored is not None
        states.append(stored[:, :, :size].contiguous())
        torch._dynamo.mark_static(states[-1], 1)
        torch._dynamo.mark_static(states[-1], 3)
    torch._dynamo.mark_static(counts, 1)
    offsets = torch.arange(layer.kv_heads, device=counts.device) * layer.slots
    _leave_behind(layer, offsets + counts, counts, layer.slots - size)
    layer.prompt_keys, layer.prompt_values, layer.counts = *states, counts


def _share_ragged(layer: BudgetLayer) -> None:
    """The same for heads with budgets of their own, of all layers that lie in one storage."""
    assert layer.kept_positions is not None
    layers, room = layer.together, layer.room
    starts = torch.cat([each.starts for each in layers if each.starts is not None], 1)
    moved = torch.arange(starts.shape[1], device=starts.device) * room
    begins = starts - moved  # in a storage without room
    slot = torch.arange(layer.kept_positions.shape[1], device=starts.device).expand(len(starts), -1).contiguous()
    place = (slot + moved[torch.searchsorted(begins, slot, right=True) - 1])[..., None]
    prompt: list[Tensor] = []
    for buffer in (layer.key_buffer, layer.value_buffer):
        assert buffer is not None
        prompt.append(buffer.gather(1, place.expand(-1, -1, buffer.shape[2])))
        torch._dynamo.mark_static(prompt[-1], 2)
    for each, own in zip(layers, begins.split(layer.kv_heads, 1), strict=True):
        own = own.contiguous()
        torch._dynamo.mark_static(own, 1)
        assert each.starts is not None
        assert each.counts is not None
        _leave_behind(each, each.starts + each.counts, each.counts, room)
        each.prompt_keys, each.prompt_values = prompt
        each.prompt_starts, each.starts = own, None


def _leave_behind(layer: Storage, first: Tensor, counts: Tensor, room: int) -> None:
    """Let a layer's buffers hold the `room` slots of each head from `first` [B, K] on, and no prompt of `counts`."""
    place = (first[..., None] + torch.arange(room, device=first.device)).flatten(1)[..., None]
    for name in ("key_buffer", "value_buffer"):
        old = getattr(layer, name)
        new = old.gather(1, place.expand(-1, -1, old.shape[2]))
        keep_marks(old, new, without=1)
        setattr(layer, name, new)
    lengths = layer.lengths - counts
    keep_marks(layer.lengths, lengths)
    layer.lengths = lengths


def choose_rows(layer: BudgetLayer, rows: Tensor, prompts: Tensor | None) -> None:
    """Let row r be what row rows[r] is, and prompt b what prompt prompts[b] is; None: prompts stay where they are.

    Of as many rows as before the storage stays where it is too: a step that was recorded finds it there.
    """

    def chosen(tensor: Tensor) -> Tensor:
        found = tensor.index_select(0, rows.to(tensor.device))
        if prompts is not None or len(found) != len(tensor):
            return found
        with torch.inference_mode():  # where the tensors may have been made
            return tensor.copy_(found)

    layer.map_tensors(chosen, without=OF_PROMPT)
    if prompts is not None:
        layer.map_tensors(lambda t: t.index_select(0, prompts.to(t.device)), only=OF_PROMPT)


def prompts_of(layer: BudgetLayer, rows: Tensor) -> Tensor | None:
    """The prompts [B'] of rows [R'] that are chosen among a layer's sequences.

    What stands side by side shares a prompt: where prompts get unlike numbers of sequences, one is held as often as the
    greatest number that divides them all asks. None: prompts stay what they are.
    """
    count = 1 if layer.prompt_keys is None else len(layer.prompt_keys)
    if count == 1:
        return None
    parents = (rows // layer.answers).tolist()
    runs = [len(list(run)) for _, run in itertools.groupby(parents)]
    prompts = parents[:: math.gcd(*runs)]
    return None if prompts == list(range(count)) else torch.tensor(prompts, dtype=torch.int64, device=rows.device)
