"""BudgetCache: a transformers Cache with a logical length (what generate counts) and a physical one (slots).

A layer's storage is one buffer [B, K * (C + N), D] for keys and one for values, with `offsets` and `lengths` per KV
head; `keys` and `values` are its [B, K, C + N, D] views. The slots of a head are filled from its offset without
holes: the kept prompt positions first, then the generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache

ROOM_STEP = 64  # slots for generated tokens come in blocks of this many


def round_room(tokens: int) -> int:
    """Slots N for `tokens` generated tokens: a multiple of 64, at least 64."""
    return max(1, -(-tokens // ROOM_STEP)) * ROOM_STEP


class BudgetLayer(CacheLayerMixin):
    """One layer's pruned K/V. `lengths` [B, K] counts the slots in use, `positions` [B, K, C] the prompt's part."""

    is_sliding = False
    is_croppable = False  # a crop into the pruned prompt cannot put dropped positions back
    supports_early_init = False

    def __init__(self, cache: BudgetCache, index: int, budget: int) -> None:
        self.cache = cache
        self.index = index
        self.budget = budget
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.lengths: Any = None  # a tensor after the prefill
        self.positions: Tensor | None = None

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
    def is_compileable(self) -> bool:
        # True once the prefill is over: generate then makes a mask of fixed shape for each decode step.
        return self.is_initialized and not self.cache.exact

    @property
    def batch_size(self) -> int:
        return -1 if self.key_buffer is None else self.key_buffer.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prefill graph makes the storage; there is nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Traces to `specpass::fill` (prefill) or `specpass::append_kv` (afterwards); see `BudgetCache.update`."""
        cache = self.cache
        if not self.is_initialized:
            short = cache.fits(key_states)
            budget = cache.whole if short else self.budget
            self.key_buffer, self.value_buffer, self.lengths, self.positions = torch.ops.specpass.fill(
                key_states, value_states, cache.handle, budget, cache.room, self.index, short
            )
            self.is_initialized = True
            return key_states, value_states
        if cache.exact:  # kept whole, without free slots: goes on like transformers' DynamicCache
            self.key_buffer, self.value_buffer = torch.ops.specpass.extend_kv(
                self.keys, self.values, key_states, value_states
            )
            self.lengths.add_(key_states.shape[2])
            return self.keys, self.values
        torch.ops.specpass.append_kv(
            self.key_buffer, self.value_buffer, self.lengths, key_states, value_states, cache.handle
        )
        if cache.widest is None:
            return self.keys, self.values
        slots = cache.layers[cache.widest].slots  # the model makes one mask for all layers
        return tuple(
            torch.ops.specpass.widen(buffer, self.kv_heads, slots) for buffer in (self.key_buffer, self.value_buffer)
        )

    def get_seq_length(self) -> int | Tensor:
        return self.cache.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.cache.exact:
            return self.slots + query_length, 0
        if not torch.compiler.is_compiling():
            self.cache.reserve(query_length)  # generate asks before each step: the time to make room
        widest = self if self.cache.widest is None else self.cache.layers[self.cache.widest]
        return (widest.slots, 0) if self.is_initialized else (query_length, 0)

    def get_max_length(self) -> int:
        return -1

    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors by name; empty before the prefill."""
        names = ("key_buffer", "value_buffer", "lengths", "positions")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor t by change(t); sizes that decode takes as constants stay constants."""
        for name, tensor in self.tensors().items():
            new = change(tensor)
            for axis in getattr(tensor, "_dynamo_static_indices", ()):
                torch._dynamo.mark_static(new, axis)
            setattr(self, name, new)

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_tensors(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_tensors(lambda t: t[indices])

    def offload(self) -> None:
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Layers stay where the graph made them."""

    def grow(self, slots: int) -> None:
        """Reallocate to at least `slots` more slots a KV head, keeping what is stored."""
        extra = round_room(slots)

        def widen(view: Tensor) -> Tensor:
            return torch.nn.functional.pad(view, (0, 0, 0, extra)).flatten(1, 2)

        self.key_buffer, self.value_buffer = widen(self.keys), widen(self.values)
