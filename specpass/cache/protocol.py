"""What transformers asks of a cache and of its layers, answered in terms of slots in use and tokens counted.

Two lengths: the logical one is what generate counts (positions), the physical one is slots (masks). generate, beam
search and the models' own code call these methods; storage is in layer.py, what is kept in budget.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.cache_utils import LinearAttentionCacheLayerMixin as Recurrent

from specpass.cache.answers import OF_PROMPT, choose_rows, prompts_of, share, why_copied
from specpass.cache.conversation import CONVERSATIONS
from specpass.cache.drafting import DRAFTS
from specpass.cache.layer import Storage
from specpass.cache.replay import REPLAYS
from specpass.cache.rows import repeat_rows
from specpass.cache.triattention import turns
from specpass.cache.widest import tell_widest
from specpass.dialect.define import SPEC
from specpass.errors import CacheStateError
from specpass.methods.base import Method
from specpass.rewrite.sites import Rotation
from specpass.sizes import Span

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache


class CacheProtocol(Cache):
    """transformers' side of a BudgetCache."""

    layers: list[Any]  # a BudgetLayer wherever attention is pruned; states and nothing at all elsewhere
    budgeted: list[BudgetLayer]  # those that hold keys and values
    columns: int | None
    read_mask: Tensor | None
    method: Method
    in_slots: bool
    foresees: bool
    seen: Any  # tokens that generate counts: 0, or a 0-d tensor after the prefill
    appended: int
    uneven: int
    settled: int
    lookahead_ids: Tensor | None
    prompt_positions: Tensor | None
    shift: Tensor | None

    @property
    def filled(self) -> bool:
        """Whether a prompt was read."""
        return any(layer.is_initialized for layer in self.budgeted)

    @property
    def biased(self) -> bool:
        """Whether attention adds a bias by the positions of its keys, in some layer."""
        return any(layer.biased for layer in self.budgeted)

    @property
    def is_linear(self) -> list[bool]:
        """Layers with a state and no attention."""
        return [isinstance(layer, Recurrent) and not isinstance(layer, BudgetLayer) for layer in self.layers]

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """Physical length: slots in use, as a 0-d tensor after the prefill (masks are in slot coordinates)."""
        if self.columns is not None:
            return self.columns
        layer = self.layers[layer_idx]
        return layer.lengths.max() if layer.is_initialized else 0

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `tokens_to_remove` tokens that were appended behind the pruned prompt.

        Raises:
            CacheStateError: more tokens than were appended; dropped prompt positions cannot come back.
        """
        tokens_to_remove = abs(tokens_to_remove)  # transformers' own layers take it negative
        states = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, Recurrent)}
        stuck = next((index for index, layer in states.items() if not (layer.is_croppable and layer.record_past)), None)
        if tokens_to_remove and stuck is not None:
            raise CacheStateError(
                f"crop({tokens_to_remove}): layer {stuck} has a state, which no token can be taken out of; call "
                "reset() and read the prompt anew (assisted decoding needs a target without such states)."
            )
        if stuck is None:
            for layer in states.values():  # convolutions that were told to record what they read
                layer.drop_recorded(tokens_to_remove)
        if tokens_to_remove == 0 or not self.filled:
            return
        if not 0 < tokens_to_remove <= self.appended:
            raise CacheStateError(
                f"crop({tokens_to_remove}): only the {self.appended} tokens behind the pruned prompt can be removed; "
                "call reset() to prune a prompt anew."
            )
        if self.appended - tokens_to_remove < self.settled:
            raise CacheStateError(
                f"crop({tokens_to_remove}): tokens in front of the last {self.appended - self.settled} were evicted "
                "(generated= bounds them), and would be missed: remove fewer, raise generated, or call reset()."
            )
        if self.appended - tokens_to_remove < self.uneven:
            raise CacheStateError(
                f"crop({tokens_to_remove}): some of these tokens were masked and stand in no slot, in some rows: "
                f"remove at most {self.appended - self.uneven}, or call reset() to prune a prompt anew."
            )
        for layer in self.budgeted:
            layer.crop(tokens_to_remove)
        if self.columns is not None:
            self.columns -= tokens_to_remove
            self.read_mask = None if self.read_mask is None else self.read_mask[:, :-tokens_to_remove]
        self.seen.sub_(tokens_to_remove)
        self.appended -= tokens_to_remove
        replay = REPLAYS.get(self)
        if replay is not None and not replay.take_back(self):
            del REPLAYS[self]

    @property
    def answers(self) -> int:
        """n sequences of each prompt, which share its slots; 1 where each row has its own."""
        return max((layer.answers for layer in self.budgeted), default=1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row r go on from what row beam_idx[r] holds.

        Rows that share a prompt move their own slots alone; the prompt's move where rows take another one's.
        """
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let `repeats` sequences go on from each row, side by side, which share the slots of its prompt."""
        super().batch_repeat_interleave(repeats)
        drafting = DRAFTS.get(self)
        self.map_rows(lambda t: repeat_rows(t, repeats))
        if drafting is not None:
            DRAFTS[self] = drafting.mapped(lambda t: repeat_rows(t, repeats))
        tell_widest(self.budgeted)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` name, as reorder_cache does; their number may be another one."""
        if self.filled:
            count = max(layer.batch_size for layer in self.budgeted)
            self._take(torch.arange(count, device=indices.device)[indices])

    def _take(self, rows: Tensor) -> None:
        shared = next((layer for layer in self.budgeted if layer.prompt is not None), None)
        prompts = None if shared is None else prompts_of(shared, rows)
        for layer in self.layers:
            if isinstance(layer, BudgetLayer):
                layer.take_rows(rows, prompts)
            else:
                layer.reorder_cache(rows)
        self.map_rows(lambda t: t.index_select(0, rows.to(t.device)))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch to what the cache itself holds of each row."""
        for name in ("lookahead_ids", "prompt_positions", "shift", "read_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        if self in REPLAYS:
            REPLAYS[self].map_rows(change)
        if self in CONVERSATIONS:
            CONVERSATIONS[self].map_rows(change)
        drafting = DRAFTS.pop(self, None)  # whose keys and values are not moved from row to row at each token
        if drafting is not None and self.foresees:  # which reads them once in many
            DRAFTS[self] = drafting.mapped(change)


def renumbered(positions: Tensor, read: Tensor) -> Tensor:
    """Positions [B, K, C] of a prompt, -1 unused, as numbers among those of it that were read [B, C1], ascending."""
    ascending = read.masked_fill(read < 0, torch.iinfo(read.dtype).max)[:, None].expand(-1, positions.shape[1], -1)
    found = torch.searchsorted(ascending.contiguous(), positions.contiguous())
    return found.masked_fill(positions < 0, -1)


def is_traced() -> bool:
    """Whether Dynamo traces, or make_fx (drafts and exports are captured without Dynamo)."""
    return torch.compiler.is_dynamo_compiling() or get_proxy_mode() is not None


class BudgetLayer(Storage, CacheLayerMixin):
    """One layer of a BudgetCache, as transformers knows it."""

    is_croppable = False  # a crop into the pruned prompt cannot put dropped positions back
    supports_early_init = False

    def __init__(self, cache: BudgetCache, index: int, budget: int, span: Span | None) -> None:
        """Args: budget: slots C for the prompt. span: what the config says of the layer's attention."""
        self.cache = cache
        self.index = index
        self.budget = budget
        self.span = span
        # transformers makes one mask for layers that say so, and one for the rest. Decided here: computed while Dynamo
        # traces, it is a symbol that equals nothing.
        self.is_sliding = span is not None and span.positions > 0
        self.ragged = cache.method.spread != "uniform" and not self.is_sliding
        self.bits = 0 if self.is_sliding else cache.bits
        self.found: Span | None = None  # what the prefill's graph says of it
        self.widest: int | None = None  # of its kind, where they are unlike: the model makes one mask for all of them
        self.reset()

    @property
    def kept(self) -> int:
        """Slots that a prompt fills: as its graph found, where a mask said more than the config; none if quantised."""
        if self.parted or (self.bits and not self.unquantized):
            return 0
        return self.found.positions if self.found is not None and self.found.positions else self.budget

    @property
    def is_compileable(self) -> bool:
        # True once the prefill is over: generate then makes a mask of fixed shape for each decode step.
        return self.is_initialized and not self.cache.exact and self.cache.columns is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prefill graph makes the storage; there is nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Traces to `specpass::fill` (prefill) or `specpass::append_kv` (afterwards); see `BudgetCache.update`."""
        cache = self.cache
        if not self.is_initialized:
            short = cache.fits(key_states)
            budget = cache.whole if short and not self.is_sliding else self.budget
            self.key_buffer, self.value_buffer, self.lengths, self.kept_positions = SPEC.fill(
                key_states, value_states, cache.handle, budget, cache.room, self.index, short
            )
            if self.ragged:
                self.starts, self.counts = SPEC.head_offsets(self.lengths, cache.room)
            if cache.rungs and not short and not self.is_sliding:
                self.rung, self.shares = SPEC.kept_shares(self.kept_positions, list(cache.rungs))
            if self.bits:
                self.quantize(budget)
            self.is_initialized = True
            return key_states, value_states
        if cache.exact:  # kept whole, without free slots: goes on like transformers' DynamicCache
            self.key_buffer, self.value_buffer = SPEC.extend_kv(self.keys, self.values, key_states, value_states)
            self.lengths.add_(key_states.shape[2])
            return self.keys, self.values
        positions = (self.positions if self.told is None else self.told) if self.biased else None
        tensors = (self.key_buffer, self.value_buffer, self.lengths, key_states, value_states)
        asked = {} if self.queries is None else {"queries": self.queries}
        if self.ragged and self.prompt is None:
            SPEC.append_kv(*tensors, cache.handle, positions, self.starts, **asked)
            return tuple(SPEC.show_heads(buffer, self.starts, self.slots) for buffer in tensors[:2])
        if self.prompt is not None:
            SPEC.append_kv(*tensors, cache.handle, **asked, prompt=self.prompt)
        elif self.quantized is None:
            SPEC.append_kv(*tensors, cache.handle, positions, **asked)
        else:
            SPEC.append_kv(*tensors, cache.handle, None, None, self.quantized, self.bits, **asked)
        if self.widest is None:
            return self.stored(self.key_buffer), self.stored(self.value_buffer)
        slots = cache.layers[self.widest].slots
        return tuple(SPEC.widen(buffer, self.kv_heads, slots) for buffer in (self.key_buffer, self.value_buffer))

    def quantize(self, slots: int) -> None:
        """Put a prompt of C `slots` that was just stored into fewer bits; what follows it stays as it comes."""
        found = SPEC.quantize_kv(self.key_buffer, self.value_buffer, self.lengths, slots, self.cache.room, self.bits)
        self.key_buffer, self.value_buffer, self.lengths, self.codes, self.counts, self.basis = found

    @property
    def room(self) -> int:
        return self.cache.free_at_prefill

    @property
    def is_full(self) -> bool:
        """Whether its tokens are read until they are evicted; else a window of its own says what nobody reads."""
        return not (self.is_sliding or (self.found is not None and self.found.positions))

    def hear(self, like: Tensor) -> None:
        """Make room for the newest queries of rows `like` [B, ...], where evictions ask by them."""
        bound = self.cache.bound
        if bound is not None and bound.asks and self.readers is not None and self.is_full and self.queries is None:
            self.queries = self.readers.room(bound.noted, like)

    def turn(self, rotation: Rotation) -> None:
        """Note how its queries and keys turn; what evictions take of that is on the device from now on."""
        if self.rotation is None and self.queries is not None:
            self.rotation = rotation
            turns(rotation, self.queries.shape[3], self.queries.shape[2], self.queries.device)

    def tell_positions(self) -> None:
        """Note the positions that the target was told of the prompt's slots, before the first step that reads them."""
        assert self.positions is not None
        if self.told is not None or hasattr(self.positions, "_dynamo_static_indices"):
            return
        how, read = self.cache.method.prompt, self.cache.prompt_positions
        if how is not None and how.positions == "renumber" and read is not None:
            self.told = renumbered(self.positions, read)
            torch._dynamo.mark_static(self.told, 1)
        torch._dynamo.mark_static(self.positions, 1)

    def get_seq_length(self) -> int | Tensor:
        if self.cache.in_slots and self.is_initialized and is_traced():
            return self.slots
        if self.cache.listener is not None:  # the target asks, and counts what it was told
            return self.cache.columns or 0
        return self.cache.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.cache.columns is not None:  # uncompiled: masks count the target's columns
            return self.cache.columns + query_length, 0
        if self.cache.exact:
            return self.slots + query_length, 0
        if not torch.compiler.is_dynamo_compiling():
            self.cache.reserve(query_length)  # generate asks before each step: the time to make room
        widest = self if self.widest is None else self.cache.layers[self.widest]
        return (widest.slots, 0) if self.is_initialized else (query_length, 0)

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.lengths.sub_(tokens)
        self.forget(tokens)
        if self.exact or self.cache.exact:
            views = [view for view in (self.keys, self.values) if view is not None]
            self.key_buffer, self.value_buffer = (view[:, :, :-tokens].flatten(1, 2) for view in views)

    def forget(self, tokens: int) -> None:
        """Let the last `tokens` queries noted ask for nothing, which zeros do."""
        if self.queries is not None:
            left = self.queries[:, :, : max(self.queries.shape[2] - tokens, 0)].clone()
            self.queries.zero_()[:, :, self.queries.shape[2] - left.shape[2] :] = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take_rows(beam_idx, prompts_of(self, beam_idx))

    def take_rows(self, rows: Tensor, prompts: Tensor | None = None) -> None:
        """Let row r be what row rows[r] is, and prompt b what prompt prompts[b] is; None: prompts stay."""
        if self.prompt is not None:
            choose_rows(self, rows, prompts)
        else:
            self.map_tensors(lambda t: t.index_select(0, rows.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats > 1 and self.is_initialized and self.prompt is None and not why_copied(self):
            share(self)
        shared = () if self.prompt is None else OF_PROMPT
        self.map_tensors(lambda t: repeat_rows(t, repeats), without=shared)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch_size, device=indices.device)[indices])

    def offload(self) -> None:
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Layers stay where the graph made them."""
