"""A layer's storage: what is kept of each KV head, and where it lies.

One buffer [B, K * (C + N), D] for keys and one for values, with `offsets` and `lengths` per KV head; `keys` and
`values` are its [B, K, C + N, D] views. The slots of a head are filled from its offset without holes: the kept prompt
positions first, then the generated tokens.

Of a quantised prompt these buffers hold what follows it alone, [B, K * N, D], and `lengths` counts that; `codes` are
the prompt's slots (specpass/bits.py). In the same way where several sequences share a prompt (answers.py): its slots
are [B, K, C, D] then, and the buffers [R, K * N, D] hold what follows in each of R sequences.

Where heads have budgets of their own (`ragged`), a head's C_k + N slots lie behind the last head's, in each row by
itself: the buffers are as large as with equal budgets, and `starts` says where each head begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specpass.cache.joined import by_head, joined
from specpass.cache.rows import repeat_rows
from specpass.cache.worth import Readers
from specpass.rewrite.sites import Rotation

SHARED = ("key_buffer", "value_buffer", "kept_positions")  # of layers that share one storage
PROMPT = ("prompt_keys", "prompt_values", "prompt_starts")  # that several sequences share
SHARED_PROMPT = ("prompt_keys", "prompt_values", "kept_positions")  # of those whose answers share a prompt
ROOM_STEP = 64  # slots for generated tokens come in blocks of this many
FIRST_ROOM = 512  # and are at most so many before anything is generated: a limit of 131,072 tokens is seldom reached


def round_room(tokens: int) -> int:
    """Slots N for `tokens` generated tokens: a multiple of 64, at least 64."""
    return max(1, -(-tokens // ROOM_STEP)) * ROOM_STEP


def first_room(tokens: int) -> int:
    """Slots N that a prefill makes for an answer of up to `tokens` tokens."""
    return round_room(min(tokens, FIRST_ROOM))


def grown_room(room: int, needed: int) -> int:
    """Slots N once `needed` tokens do not fit in `room`: half as many more, or what is needed.

    So at most a third of N is unused, a generation moves its storage a few times, and decode has few sizes.
    """
    return max(room + round_room(room // 2), round_room(needed))


def room_of(tokens: int) -> int:
    """Slots N of a cache that `tokens` tokens were generated into, one by one."""
    room = first_room(tokens)
    while room < tokens:
        room = grown_room(room, room + 1)
    return room


class Storage:
    """One layer's pruned K/V. `lengths` [B, K] counts the slots in use, `positions` [B, K, C] the prompt's part."""

    ragged = False  # whether KV heads have budgets of their own
    bits = 0  # of the prompt's slots, unless `unquantized`; 0: the model's dtype
    sharers: Sequence[Storage] = ()  # layers, in order, this one included, whose heads lie in one storage

    def reset(self) -> None:
        self.is_initialized = False
        self.exact = False  # whether everything is kept, in the caller's columns and without free slots
        self.made = False  # whether attention reads what an uncompiled model makes of this (MLA)
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.lengths: Any = None  # a tensor after the prefill
        self.kept_positions: Tensor | None = None  # [B, K, C]; of ragged heads [B, K * C], one's behind the other's
        self.starts: Tensor | None = None  # [B, K] first slot of each ragged head
        self.counts: Tensor | None = None  # [B, K] slots of each ragged head that hold the prompt's positions
        self.rung: Tensor | None = None  # [B, K, C] the first budget that keeps each slot; empty once one is chosen
        self.shares: Tensor | None = None  # [B] of the scored rows' attention that is kept, where it chose the budget
        self.told: Tensor | None = None  # [B, K, C] positions as the target was told them, where it was told others
        self.ordinals: Tensor | None = None  # [B, K, M] of generated tokens, once some were evicted: see evict.py
        self.settled: Tensor | None = None  # [B, K] slots of which they are told
        self.evicted: Tensor | None = None  # [B, K] generated tokens that were
        self.readers: Readers | None = None  # who reads it, once its prompt was read
        self.rotation: Rotation | None = None  # of its queries and keys, once a step's graph has told it
        self.queries: Tensor | None = None  # [B, H, W, D] of the newest tokens, times the scale, where evictions ask
        self.codes: Tensor | None = None  # [B, K, n, bytes] of a quantised prompt, with `counts`: see kernels/bits
        self.basis: Tensor | None = None  # [B, K, r, D + Dv]
        self.prompt_keys: Tensor | None = None  # [B, K, C, D] of a prompt that several sequences share, with `counts`
        self.prompt_values: Tensor | None = None  # [B, K, C, Dv]
        self.prompt_starts: Tensor | None = None  # [B, K] first slot of each ragged head, in [B, T, D] then
        self.unquantized = ""  # why its prompt was left as it is, where others are in fewer bits
        self.biased = False  # whether attention adds a bias by the positions of its keys (ALiBi)

    @property
    def kv_heads(self) -> int:
        """K, from the tensors: as a Python int, Dynamo would make it a symbol of its own for each layer."""
        return 0 if self.lengths is None else self.lengths.shape[1]

    @property
    def keys(self) -> Tensor | None:
        """[B, K, C + N, D] view of the storage, or None before the prefill.

        Of ragged heads a copy of the slots in use, as long as the longest head's, zero behind the others'. Of a
        quantised or a shared prompt and what follows it a copy, too.
        """
        return joined(self, "key", self.key_buffer) if self.parted else self.stored(self.key_buffer)

    @property
    def values(self) -> Tensor | None:
        return joined(self, "value", self.value_buffer) if self.parted else self.stored(self.value_buffer)

    @property
    def quantized(self) -> list[Tensor] | None:
        """Codes, counts and basis of a prompt in fewer bits; None where it is in the model's dtype."""
        if self.codes is None or self.unquantized:
            return None
        assert self.counts is not None
        assert self.basis is not None
        return [self.codes, self.counts, self.basis]

    @property
    def prompt(self) -> list[Tensor] | None:
        """Keys, values and counts of a prompt that several sequences share, of ragged heads starts as well; None where
        each has its own."""
        if self.prompt_keys is None:
            return None
        assert self.prompt_values is not None
        assert self.counts is not None
        starts = [] if self.prompt_starts is None else [self.prompt_starts]
        return [self.prompt_keys, self.prompt_values, self.counts, *starts]

    @property
    def parted(self) -> bool:
        """Whether the buffers hold what follows the prompt alone."""
        return self.quantized is not None or self.prompt is not None

    @property
    def answers(self) -> int:
        """n sequences of each prompt, which share its slots; 1 where each has its own."""
        return 1 if self.prompt_keys is None else self.lengths.shape[0] // self.prompt_keys.shape[0]

    def by_row(self, states: Tensor) -> Tensor:
        """[R, ...] of what a layer has of each prompt [B, ...]."""
        return states if self.prompt is None else repeat_rows(states, self.answers)

    def stored(self, buffer: Tensor | None) -> Tensor | None:
        """[B, K, slots, D] of one of the two buffers, which hold no prompt where that is quantised."""
        if buffer is None:
            return None
        if self.starts is not None:
            return by_head(buffer, self.starts, self.lengths, 0)
        return buffer.view(buffer.shape[0], self.kv_heads, buffer.shape[1] // self.kv_heads, buffer.shape[2])

    @property
    def slots(self) -> int:
        """Physical slots C + N of each KV head, of ragged ones in the mean; 0 before the prefill.

        N behind a quantised or a shared prompt.
        """
        return 0 if self.key_buffer is None else self.key_buffer.shape[1] // (self.kv_heads * len(self.together))

    @property
    def offsets(self) -> Tensor | None:
        """[K + 1] int64: head k's slots are offsets[k] .. offsets[k + 1] - 1 of the storage; ragged: [B, K + 1]."""
        if self.key_buffer is None:
            return None
        if self.starts is not None:
            assert self.counts is not None
            return torch.cat([self.starts, (self.starts + self.counts)[:, -1:] + self.room], 1)
        return torch.arange(self.kv_heads + 1, device=self.key_buffer.device) * self.slots

    @property
    def prompt_slots(self) -> Tensor | None:
        """[B, K]: slots of each head that hold the prompt's positions; None before the prefill."""
        if self.kept_positions is None:
            return None
        if self.prompt is not None:
            return self.by_row(self.prompt[2])
        return (self.kept_positions >= 0).sum(-1) if self.starts is None else self.counts

    @property
    def behind(self) -> Tensor | None:
        """[B, K]: slots of the buffers in front of the generated tokens': those of a prompt that lies in them."""
        return torch.zeros_like(self.lengths) if self.parted else self.prompt_slots

    @property
    def room(self) -> int:
        """Slots N of each head for what follows the prompt."""
        raise NotImplementedError

    @property
    def positions(self) -> Tensor | None:
        """[B, K, C] prompt positions kept, ascending; unused slots -1. Of ragged heads or shared prompts a copy."""
        if self.kept_positions is None:
            return None
        if self.prompt_starts is not None:
            return self.by_row(by_head(self.kept_positions, self.prompt_starts, self.counts, -1))
        if self.starts is None:
            return self.by_row(self.kept_positions)
        assert self.counts is not None
        first = self.sharers.index(self) * self.kv_heads if self.sharers else 0
        rooms = torch.arange(first, first + self.kv_heads, device=self.starts.device) * self.room
        return by_head(self.kept_positions, self.starts - rooms, self.counts, -1)

    @property
    def generated(self) -> Tensor | None:
        """[B, K, M] numbers, from 0, of the generated tokens that a bounded layer holds, ascending; unused slots -1.

        None before any was evicted. [B, K, C + M] where they share a budget with the prompt's positions.
        """
        if self.ordinals is None or self.settled is None or self.evicted is None:
            return None
        slot = torch.arange(self.ordinals.shape[2], device=self.ordinals.device)
        numbers = torch.where(slot < self.settled[..., None], self.ordinals, slot + self.evicted[..., None])
        return numbers.masked_fill(slot >= (self.lengths - self.behind)[..., None], -1)

    def places(self, slots: Tensor, rows: Tensor) -> Tensor:
        """[R, K * n]: where slots [R, K, n] of each head's own lie in the storage, of rows [R]."""
        if self.starts is None:
            starts = torch.arange(self.kv_heads, device=slots.device)[:, None] * self.slots
        else:
            starts = self.starts[rows][:, :, None]
        return (starts + slots).flatten(1)

    @property
    def batch_size(self) -> int:
        return -1 if self.key_buffer is None else self.key_buffer.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by name; empty before the prefill."""
        stored = ("key_buffer", "value_buffer", "lengths", "kept_positions", "starts", "counts", "told", "shares")
        bounded, apart = ("ordinals", "settled", "evicted", "queries"), ("codes", "basis", *PROMPT)
        names = (*stored, *bounded, *apart)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def map_tensors(
        self, change: Callable[[Tensor], Tensor], *, only: Sequence[str] = (), without: Sequence[str] = ()
    ) -> None:
        """Replace each tensor t by change(t), or `only` those that are named, or all `without` those; sizes that decode
        takes as constants stay constants."""
        for name, tensor in self.tensors().items():
            if name in without or (only and name not in only):
                continue
            together = self._holders(name)
            if together[0] is self:  # the first of those that share changes what they share
                new = change(tensor)
                keep_marks(tensor, new)
                for layer in together:
                    setattr(layer, name, new)

    @property
    def together(self) -> Sequence[Storage]:
        """Layers whose storage is one."""
        return self.sharers if self.sharers and self.starts is not None else (self,)

    def _holders(self, name: str) -> Sequence[Storage]:
        """Layers that hold one tensor of that name."""
        if self.sharers and self.prompt_starts is not None:
            return self.sharers if name in SHARED_PROMPT else (self,)
        return self.together if name in SHARED else (self,)

    def grow(self, slots: int) -> None:
        """Reallocate to `slots` more slots a KV head, keeping what is stored."""
        if self.starts is not None:
            self._grow_ragged(slots)
            return
        total = self.slots + slots

        def widen(view: Tensor, old: Tensor) -> Tensor:
            new = old.new_zeros(old.shape[0], self.kv_heads * total, old.shape[2])
            new.view(old.shape[0], self.kv_heads, total, old.shape[2])[:, :, : view.shape[2]] = view
            keep_marks(old, new, without=1)  # the number of slots is another one now
            return new

        self.key_buffer, self.value_buffer = (
            widen(self.stored(buffer), buffer) for buffer in (self.key_buffer, self.value_buffer)
        )

    @property
    def used(self) -> Tensor | None:
        """0-d: slots of a head, in the mean, that the prompt's positions take in a storage of ragged heads.

        Of the row that takes most, rounded up; None where it is another layer's to say, or heads are not ragged.
        """
        last, heads = self.together[-1], self.kv_heads * len(self.together)
        if self.together[0] is not self or self.key_buffer is None or last.starts is None or last.counts is None:
            return None
        end = (last.starts + last.counts)[:, -1].max() - (heads - 1) * self.room
        return torch.div(end + heads - 1, heads, rounding_mode="floor")

    def tighten(self, kept: int) -> None:
        """Cut a storage of ragged heads to `kept` slots for the prompt of each, in the mean; see `used`."""
        together, heads = self.together, self.kv_heads * len(self.together)

        def cut(old: Tensor, slots: int) -> Tensor:
            new = old[:, : heads * slots].contiguous()
            keep_marks(old, new, without=1)
            return new

        assert self.value_buffer is not None
        assert self.kept_positions is not None
        keys, values = (cut(old, kept + self.room) for old in (self.key_buffer, self.value_buffer))
        positions = cut(self.kept_positions, kept)
        for layer in together:
            layer.key_buffer, layer.value_buffer, layer.kept_positions = keys, values, positions

    def _grow_ragged(self, slots: int) -> None:
        """Each head moves on by what its predecessors grew."""
        together = self.together
        if together[0] is not self:
            return
        starts = torch.cat([layer.starts for layer in together if layer.starts is not None], 1)
        moved = torch.arange(starts.shape[1], device=starts.device) * slots

        def widen(old: Tensor) -> Tensor:
            slot = torch.arange(old.shape[1], device=starts.device).expand(len(starts), -1).contiguous()
            place = slot + moved[torch.searchsorted(starts, slot, right=True) - 1]
            new = old.new_zeros(old.shape[0], old.shape[1] + len(moved) * slots, old.shape[2])
            new.scatter_(1, place[..., None].expand_as(old), old)
            keep_marks(old, new, without=1)
            return new

        assert self.key_buffer is not None
        assert self.value_buffer is not None
        keys, values = widen(self.key_buffer), widen(self.value_buffer)
        for layer, own in zip(together, moved.split(self.kv_heads), strict=True):
            assert layer.starts is not None
            begin = layer.starts + own
            keep_marks(layer.starts, begin)
            layer.key_buffer, layer.value_buffer, layer.starts = keys, values, begin


def keep_marks(old: Tensor, new: Tensor, without: int | None = None) -> None:
    """Sizes of `old` that decode's graphs take as constants are constants of `new`, but for the axis `without`."""
    for axis in getattr(old, "_dynamo_static_indices", ()):
        if axis != without:
            torch._dynamo.mark_static(new, axis)
