"""Capture a draft model as two graphs, when the backend is made: prefill and one decode step.

Parameters are inputs, sizes are symbolic (see capture.model), rows are packed (see pack_rows).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

import specpass.ops  # noqa: F401  (binds the operators that a draft's layers trace to)
from specpass.capture import stored
from specpass.capture.model import BATCH, COUNT, SLOTS, ModelTrace, asks_for_length, weights_of
from specpass.dialect.define import SPEC
from specpass.graph.operands import results_of
from specpass.graph.walk import value
from specpass.methods.base import Method
from specpass.methods.specpc import SpecPC
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Inputs, Rows, Spans, Weights
from specpass.passes.pipeline import draft_prefill_passes, draft_step_passes
from specpass.passes.score_draft import StepRows
from specpass.rewrite import Facts, Kind, Pass, Pipeline, Request
from specpass.rewrite.sites import Sites
from specpass.sizes import eos_ids, layer_spans, pad_id


class _DraftLayer(CacheLayerMixin):
    """Cache of one draft layer during capture: holds what the graph passes through it."""

    is_sliding = False

    def __init__(
        self,
        lengths: Tensor,
        room: Any = None,
        buffers: tuple[Tensor, Tensor, Tensor] | None = None,
        in_slots: bool = False,
    ) -> None:
        self.lengths, self.room, self.buffers, self.in_slots = lengths, room, buffers, in_slots
        self.is_initialized = buffers is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is None:
            self.buffers = SPEC.keep_kv(key_states, value_states, self.lengths, self.room)
            return key_states, value_states
        keys, values, lengths = self.buffers
        SPEC.append_kv(keys, values, lengths, key_states, value_states, None)
        batch, heads = key_states.shape[:2]
        slots = keys.shape[1] // heads
        return keys.view(batch, heads, slots, keys.shape[2]), values.view(batch, heads, slots, values.shape[2])

    def get_seq_length(self) -> Any:
        if self.is_initialized and self.in_slots:
            return self.get_mask_sizes(1)[0]
        return self.lengths.max() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        if not self.is_initialized:
            return query_length, 0
        return self.buffers[0].shape[1] // self.buffers[2].shape[1], 0  # type: ignore[index]

    def get_max_length(self) -> int:
        return -1


def capture_draft(draft: nn.Module, method: Method | None = None, goes_on: bool = False) -> DraftGraphs:
    """Trace `draft` (a Hugging Face decoder in eval mode) into its two graphs, as `method` needs them.

    With SpecPC and SpecKVPC they score the prompt's tokens; with `sparse_prefill` its prompt is read sparsely.

    Args: goes_on: also those by which it goes on behind its lookahead.
    Raises: Refusal when an attention site of the draft is not understood.
    """
    key = graphs_key(draft, method, goes_on)
    graphs = None if key is None else stored.load(key)
    if graphs is None:
        graphs = trace_draft(draft, method, goes_on)
        if key is not None:
            stored.save(key, graphs)
    prefill, step, extend, plain_step = graphs
    assert prefill is not None
    assert step is not None
    config = draft.generation_config
    return DraftGraphs(
        prefill,
        step,
        weights_of(draft),
        cached_layers(draft),
        int(value(results_of(step.graph)[0]).shape[-1]),
        eos_ids(config),
        pad_id(config),
        prompt=None if method is None else method.prompt,
        extend=extend,
        plain_step=plain_step,
    )


def cached_layers(draft: nn.Module) -> int:
    """Layers with a cache of their own."""
    return sum(span is not None for span in layer_spans(draft.config))


def graphs_key(draft: nn.Module, method: Method | None, goes_on: bool) -> stored.Key | None:
    """By what the graphs are found on disk; of the method by the passes that it asks for."""
    layers, prompt = cached_layers(draft), None if method is None else method.prompt
    return stored.key_of(draft, draft_prefill_passes(layers, method), draft_step_passes(layers, prompt), goes_on)


def trace_draft(draft: nn.Module, method: Method | None, goes_on: bool) -> stored.Graphs:
    """prefill, step, and where the draft goes on: extend, plain step (see DraftGraphs)."""
    prompt = None if method is None else method.prompt
    capture = _Capture(ModelTrace(draft), Spans(layer_spans(draft.config)))
    prefill, step = capture.prefill(method), capture.step(prompt)
    if not goes_on:
        return prefill, step, None, None
    return prefill, step, capture.extend(), step if prompt is None else capture.step(None)


class _Capture:
    """Traces and rewrites the draft's graphs; `shapes` (K, D, Dv) of each layer are known once the prefill is.

    `layers`: those with a cache; others have no attention, or read another's.
    """

    def __init__(self, model: ModelTrace, spans: Spans) -> None:
        self.model, self.spans = model, spans
        self.layers = sum(span is not None for span in spans.layers)
        self.shapes: list[tuple[int, int, int]] = []
        self.biased = False  # whether attention adds a bias of the keys, known once the prefill is

    def prefill(self, method: Method | None) -> fx.GraphModule:
        """prefill(ids [B, S], lengths [B], room, *params) -> logits, caches; scores where the prompt is compressed."""

        def run(ids: Tensor, lengths: Tensor, room: Any, *params: Tensor) -> Any:
            cache = self._cache(_DraftLayer(lengths, room) for _ in range(self.layers))
            logits = self.model.forward(params, ids, cache)
            buffers = [tensor for layer in cache.layers for tensor in getattr(layer, "buffers", ())]
            return logits, *buffers

        gm = self.model.trace(run, self.model.ids, self.model.lengths, self.model.room)
        ids, lengths, _room, *params = gm.graph.find_nodes(op="placeholder")
        weights = Weights(dict(zip(params, self.model.params.values(), strict=True)))
        facts = Facts(Inputs(ids), Rows(lengths), weights, self.spans)
        self._rewrite(gm, draft_prefill_passes(self.layers, method), "prefill", facts)
        sites = facts[Sites].owners
        self.shapes.extend(site.kv_shape for site in sites)
        found = iter(sites)
        self.spans = Spans(tuple(None if span is None else next(found).span for span in self.spans.layers))
        self.biased = any(site.alibi is not None for site in sites)
        return gm

    def _cache(self, layers: Iterable[_DraftLayer]) -> Cache:
        """Of the draft's layers in their places."""
        own = iter(layers)
        return Cache(layers=[DummyLayer() if span is None else next(own) for span in self.spans.layers])

    def step(self, prompt: SpecPC | None) -> fx.GraphModule:
        """step(ids [B, 1], position [B, 1], *caches, *params) -> logits; more with a `prompt`, see DraftGraphs."""
        ids, position = (self.model.dynamic((BATCH, 1), torch.int64, (0,)) for _ in range(2))
        # Rows and lengths: read by what score_draft_step inserts.
        extra = [] if prompt is None else [self.model.dynamic((BATCH, 1), torch.int64, (0,)), self.model.lengths]
        gm = self._behind(ids, position, extra)
        facts = Facts(self.spans)
        if prompt is not None:
            _ids, _position, rows, lengths, storage = gm.graph.find_nodes(op="placeholder")[:5]
            facts.add(StepRows(rows, lengths, storage))
        self._rewrite(gm, draft_step_passes(self.layers, prompt), "decode", facts)
        return gm

    def extend(self) -> fx.GraphModule:
        """extend(ids [B, q], position [B, q], *caches, *params) -> logits [B, 1, V] behind the last of q > 1 tokens."""
        ids, position = (self.model.dynamic((BATCH, COUNT), torch.int64, (0, 1)) for _ in range(2))
        gm = self._behind(ids, position, [])
        self._rewrite(gm, draft_step_passes(self.layers, None), "append", Facts(self.spans))
        return gm

    def _behind(self, ids: Tensor, position: Tensor, extra: list[Tensor]) -> fx.GraphModule:
        """The draft's forward behind a prompt, as it is traced."""
        count, first = len(self.shapes), len(extra)
        in_slots = asks_for_length(self.model.model)

        def run(ids: Tensor, position: Tensor, *rest: Tensor) -> Tensor:
            caches, params = rest[first : first + 3 * count], rest[first + 3 * count :]
            groups = [caches[i : i + 3] for i in range(0, 3 * count, 3)]
            layers = [_DraftLayer(group[2], buffers=group, in_slots=in_slots) for group in groups]
            told = {"position_ids": position}
            if self.biased:  # such a model makes its bias as wide as its mask
                told["attention_mask"] = ids.new_ones(ids.shape[0], layers[0].get_mask_sizes(1)[0])
            return self.model.forward(params, ids, self._cache(layers), **told)

        caches = list(extra)
        for heads, dim, value_dim in self.shapes:
            for width in (dim, value_dim):
                caches.append(self.model.dynamic((BATCH, heads * SLOTS, width), self.model.dtype, (0, 1)))
            caches.append(self.model.dynamic((BATCH, heads), torch.int64, (0,)))
        return self.model.trace(run, ids, position, *caches)

    def _rewrite(self, gm: fx.GraphModule, passes: tuple[Pass, ...], kind: Kind, facts: Facts) -> None:
        Pipeline(passes).run(gm, Request(kind, model="draft"), facts)
        gm.graph.eliminate_dead_code()
        gm.meta["specpass_symbols"] = self.model.sizes
        gm.recompile()
