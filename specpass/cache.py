"""BudgetCache: a transformers Cache with a logical length (what generate counts) and a physical one (slots).

A layer's storage is one buffer [B, K * (C + N), D] for keys and one for values, with `offsets` and `lengths` per KV
head; `keys` and `values` are its [B, K, C + N, D] views. The slots of a head are filled from its offset without
holes: the kept prompt positions first, then the generated tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

import specpass.ops_prompt  # noqa: F401  (registers the operators that update() traces to, specpass.ops' too)
from specpass.errors import BudgetError, CacheStateError, LookaheadError, UncompiledCacheError
from specpass.methods.base import Method
from specpass.methods.speckv import as_id_rows

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
                key_states,
                value_states,
                cache.handle,
                budget,
                cache.room,
                cache.lookahead,
                self.index,
                len(cache.layers),
                short,
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


class BudgetCache(Cache):
    """KV cache of fixed budget; prompts are pruned into it by a graph compiled with specpass.

    Args:
        config: the target's config (its text config is used).
        method: the same method as the backend's.
        max_new_tokens: tokens to be generated; sets the room N (rounded up to a multiple of 64) and, for methods with
            `lookahead=None`, the lookahead L. Generation beyond N grows the cache.
        prompt_length: S in tokens, needed when the method's budget is a ratio.
        lookahead_ids: [B, L] token ids in place of the draft's.
        early_exit: False sends prompts that fit the budget through selection and gather too (they keep everything).

    Raises:
        BudgetError: a ratio without prompt_length. LookaheadError: lookahead=None without max_new_tokens.
    """

    def __init__(
        self,
        config: Any,
        method: Method,
        max_new_tokens: int | None = None,
        *,
        prompt_length: int | None = None,
        lookahead_ids: Any = None,
        early_exit: bool = True,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise BudgetError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        config = config.get_text_config(decoder=True)
        self.config = config
        self.layer_types: list[str] = get_layer_types_and_kwargs(config)[0]
        self.method = method.resolve(prompt_length)
        self.early_exit = early_exit
        self.max_new_tokens = max_new_tokens
        self.room = round_room(max_new_tokens or 1)
        rows = lookahead_ids if lookahead_ids is not None else getattr(method, "lookahead_ids", None)
        if lookahead_ids is not None and method.prompt is not None:
            raise LookaheadError(f"{method.name} needs the draft's attention, so lookahead_ids cannot take its place.")
        self.given_ids = None if rows is None or not method.drafts else torch.tensor(as_id_rows(rows))
        self.lookahead = self._resolve_lookahead()
        self.compresses = method.prompt is not None
        budgets = self.method.layer_budgets(config.num_hidden_layers)
        self.widest = None if len(set(budgets)) == 1 else budgets.index(max(budgets))
        self.whole: int = self.method.budget  # type: ignore[assignment]  # a prompt of so many tokens is kept whole
        super().__init__(layers=[BudgetLayer(self, index, budget) for index, budget in enumerate(budgets)])
        # The compiled graph gets tensors only; this one leads the runtime back to its cache.
        self.handle = torch.zeros((), dtype=torch.int64)
        self.handle._specpass_cache = weakref.ref(self)
        self._clear()

    def _resolve_lookahead(self) -> int:
        if not self.method.drafts:
            return 0
        if self.given_ids is not None:
            return self.given_ids.shape[1]
        length = self.method.lookahead  # type: ignore[attr-defined]
        if length is None:
            length = self.max_new_tokens
        if length is None:
            raise LookaheadError(
                f"{self.method.name}(lookahead=None) drafts max_new_tokens tokens, and this cache was not told how "
                "many: pass max_new_tokens= to BudgetCache or lookahead= to the method."
            )
        return length

    def _clear(self) -> None:
        self.seen: Any = 0  # a 0-d tensor after the prefill; logical length: tokens that generate counts
        self.lookahead_ids: Tensor | None = None
        self.prompt_positions: Tensor | None = None
        self.shift: Tensor | None = None  # [B] what generate counts less what the target was told (SpecPC)
        self.padded = False
        self.exact = False  # whether the prefill was refused and kept everything
        self.free_at_prefill = self.room
        self.appended = 0  # upper bound of tokens written behind the prompt, kept on the host

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new K/V [B, K, q, D]; only inside a graph compiled with specpass.

        Raises:
            UncompiledCacheError: called uncompiled, where nothing would prune.
        """
        if not torch.compiler.is_compiling() and not _is_traced(key_states):
            raise UncompiledCacheError(
                "BudgetCache.update was called uncompiled. Compile the model first: specpass.compile(model, draft=..., "
                "method=...) or model.compile(backend=specpass.Backend(...), dynamic=True)."
            )
        first = not self.layers[layer_idx].is_initialized
        if layer_idx == 0 and first:
            if self.lookahead > 0 and not self.fits(key_states):
                self.lookahead_ids = torch.ops.specpass.lookahead(key_states, self.given_ids, self.lookahead)
            if self.compresses:
                self.prompt_positions, self.shift = torch.ops.specpass.read_prompt(key_states)
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        if layer_idx == len(self.layers) - 1:
            if first:
                self.seen = torch.ops.specpass.size(key_states, 2)
            else:
                torch.ops.specpass.advance(self.seen, self.shift, key_states.shape[2])
        return keys, values

    def fits(self, key_states: Tensor) -> bool:
        """Whether a prompt's keys [B, K, S, D] are kept whole, without draft or scores."""
        return self.early_exit and bool(key_states.shape[2] <= self.whole)

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """Physical length: slots in use, as a 0-d tensor after the prefill (masks are in slot coordinates)."""
        layer = self.layers[layer_idx]
        return layer.lengths.max() if layer.is_initialized else 0

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forget everything; the next prompt is pruned anew."""
        super().reset()
        self._clear()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to what the cache itself holds of each row."""
        for name in ("lookahead_ids", "prompt_positions", "shift"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.map_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.map_rows(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `tokens_to_remove` tokens that were appended behind the pruned prompt.

        Raises:
            CacheStateError: more tokens than were appended; dropped prompt positions cannot come back.
        """
        tokens_to_remove = abs(tokens_to_remove)  # transformers' own layers take it negative
        if tokens_to_remove == 0 or not self.layers[0].is_initialized:
            return
        if not 0 < tokens_to_remove <= self.appended:
            raise CacheStateError(
                f"crop({tokens_to_remove}): only the {self.appended} tokens behind the pruned prompt can be removed; "
                "call reset() to prune a prompt anew."
            )
        for layer in self.layers:
            layer.lengths.sub_(tokens_to_remove)
        self.seen.sub_(tokens_to_remove)
        self.appended -= tokens_to_remove

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens, in blocks of 64 slots; nothing happens if there is room."""
        if not self.layers[0].is_initialized or self.exact:
            return
        missing = self.appended + tokens - self.free_at_prefill
        if missing > 0:
            for layer in self.layers:
                layer.grow(missing)
            self.free_at_prefill += round_room(missing)

    def __deepcopy__(self, memo: dict) -> BudgetCache:
        import copy

        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name != "handle":
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.handle = torch.zeros((), dtype=torch.int64)
        twin.handle._specpass_cache = weakref.ref(twin)
        return twin


def _is_traced(tensor: Tensor) -> bool:
    """Whether make_fx is tracing (the draft is captured without Dynamo)."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
