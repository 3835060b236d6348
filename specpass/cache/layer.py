"""A layer's storage: what is kept of each KV head, and where it lies.

One buffer [B, K * (C + N), D] for keys and one for values, with `offsets` and `lengths` per KV head; `keys` and
`values` are its [B, K, C + N, D] views. The slots of a head are filled from its offset without holes: the kept prompt
positions first, then the generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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

    def reset(self) -> None:
        self.is_initialized = False
        self.exact = False  # whether everything is kept, in the caller's columns and without free slots
        self.made = False  # whether attention reads what an uncompiled model makes of this (MLA)
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.lengths: Any = None  # a tensor after the prefill
        self.positions: Tensor | None = None
        self.told: Tensor | None = None  # [B, K, C] positions as the target was told them, where it was told others
        self.biased = False  # whether attention adds a bias by the positions of its keys (ALiBi)

    @property
    def kv_heads(self) -> int:
        """K, from the tensors: as a Python int, Dynamo would make it a symbol of its own for each layer."""
        return 0 if self.lengths is None else self.lengths.shape[1]

    @property
    def keys(self) -> Tensor | None:
        """[B, K, C + N, D] view of the storage, or None before the prefill."""
        return self._view(self.key_buffer)

    @property
    def values(self) -> Tensor | None:
        return self._view(self.value_buffer)

    def _view(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        return buffer.view(buffer.shape[0], self.kv_heads, buffer.shape[1] // self.kv_heads, buffer.shape[2])

    @property
    def slots(self) -> int:
        """Physical slots C + N of each KV head; 0 before the prefill."""
        return 0 if self.key_buffer is None else self.key_buffer.shape[1] // self.kv_heads

    @property
    def offsets(self) -> Tensor | None:
        """[K + 1] int64: head k's slots are offsets[k] .. offsets[k + 1] - 1 of the storage."""
        if self.key_buffer is None:
            return None
        return torch.arange(self.kv_heads + 1, device=self.key_buffer.device) * self.slots

    @property
    def batch_size(self) -> int:
        return -1 if self.key_buffer is None else self.key_buffer.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by name; empty before the prefill."""
        names = ("key_buffer", "value_buffer", "lengths", "positions", "told")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor t by change(t); sizes that decode takes as constants stay constants."""
        for name, tensor in self.tensors().items():
            new = change(tensor)
            keep_marks(tensor, new)
            setattr(self, name, new)

    def grow(self, slots: int) -> None:
        """Reallocate to `slots` more slots a KV head, keeping what is stored."""

        total = self.slots + slots

        def widen(view: Tensor, old: Tensor) -> Tensor:
            new = old.new_zeros(old.shape[0], self.kv_heads * total, old.shape[2])
            new.view(old.shape[0], self.kv_heads, total, old.shape[2])[:, :, : view.shape[2]] = view
            keep_marks(old, new, without=1)  # the number of slots is another one now
            return new

        self.key_buffer, self.value_buffer = widen(self.keys, self.key_buffer), widen(self.values, self.value_buffer)


def keep_marks(old: Tensor, new: Tensor, without: int | None = None) -> None:
    """Sizes of `old` that decode's graphs take as constants are constants of `new`, but for the axis `without`."""
    for axis in getattr(old, "_dynamo_static_indices", ()):
        if axis != without:
            torch._dynamo.mark_static(new, axis)
