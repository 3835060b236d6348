"""Capture a draft model as two graphs, when the backend is made: prefill and one decode step.

Parameters are inputs, sizes are symbolic (see model_trace), rows are packed (see pack_rows).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

import specpass.ops  # noqa: F401
from specpass.capture.model import BATCH, SLOTS, ModelTrace
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import output_of
from specpass.methods.specpc import SpecPC
from specpass.passes.annotate import Annotate
from specpass.passes.base import Refusal, State
from specpass.passes.canonicalize import Canonicalize
from specpass.passes.draft import DraftGraphs
from specpass.passes.pack_rows import attend_packed
from specpass.passes.score_prompt import score_prefill, score_step
from specpass.passes.specialize import attend_slots
from specpass.passes.take_last import TakeLast
from specpass.sizes import eos_ids


class _DraftLayer(CacheLayerMixin):
    """Cache of one draft layer during capture: holds what the graph passes through it."""

    is_sliding = False

    def __init__(self, lengths: Tensor, room: Any = None, buffers: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.lengths, self.room, self.buffers = lengths, room, buffers
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
        return self.lengths.max() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        if not self.is_initialized:
            return query_length, 0
        return self.buffers[0].shape[1] // self.buffers[2].shape[1], 0  # type: ignore[index]

    def get_max_length(self) -> int:
        return -1


def capture_draft(draft: nn.Module, prompt: SpecPC | None = None) -> DraftGraphs:
    """Trace `draft` (a Hugging Face decoder in eval mode) into its two graphs; with `prompt` they score its tokens.

    Raises: Refusal when an attention site of the draft is not understood.
    """
    layers = draft.config.get_text_config(decoder=True).num_hidden_layers
    config = draft.generation_config
    ends = eos_ids(config)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
    capture = _Capture(ModelTrace(draft), layers, prompt)
    prefill, step = capture.prefill(), capture.step()
    result = output_of(step.graph).args[0]
    logits = result[0] if isinstance(result, (tuple, list)) else result
    return DraftGraphs(
        prefill, step, capture.model.params, layers, int(logits.meta["val"].shape[-1]), ends, int(pad), prompt=prompt
    )


class _Capture:
    def __init__(self, model: ModelTrace, layers: int, prompt: SpecPC | None) -> None:
        self.model, self.layers, self.prompt = model, layers, prompt

    def prefill(self) -> fx.GraphModule:
        def run(ids: Tensor, lengths: Tensor, room: Any, *params: Tensor) -> Any:
            cache = Cache(layers=[_DraftLayer(lengths, room) for _ in range(self.layers)])
            logits = self.model.forward(params, ids, cache)
            buffers = [tensor for layer in cache.layers for tensor in layer.buffers]
            return logits, *buffers

        gm = self.model.trace(run, self.model.ids, self.model.lengths, self.model.room)
        inputs = gm.graph.find_nodes(op="placeholder")
        state = State("short", None, inputs={"input_ids": inputs[0]})  # type: ignore[arg-type]
        state.lengths, state.lookahead_ids = inputs[1], inputs[1]
        state.weights = dict(zip(inputs[3:], self.model.params.values(), strict=True))
        self._rewrite(gm, state)
        attend_packed(Editor(gm), state)
        TakeLast().run(gm, state)
        if self.prompt is not None:
            score_prefill(gm, state, self.prompt)
        return self._finish(gm)

    def step(self) -> fx.GraphModule:
        layers = self.draft_layers
        count = len(layers)

        first = 0 if self.prompt is None else 2  # rows and lengths: read by what score_step inserts

        def run(ids: Tensor, position: Tensor, *rest: Tensor) -> Tensor:
            caches, params = rest[first : first + 3 * count], rest[first + 3 * count :]
            groups = [caches[i : i + 3] for i in range(0, 3 * count, 3)]
            cache = Cache(layers=[_DraftLayer(group[2], buffers=group) for group in groups])
            return self.model.forward(params, ids, cache, position_ids=position)

        ids, position = (self.model.dynamic((BATCH, 1), torch.int64, (0,)) for _ in range(2))
        caches = []
        if self.prompt is not None:
            caches = [self.model.dynamic((BATCH, 1), torch.int64, (0,)), self.model.lengths]
        for heads, dim, value_dim in layers:
            for width in (dim, value_dim):
                caches.append(self.model.dynamic((BATCH, heads * SLOTS, width), self.model.dtype, (0, 1)))
            caches.append(self.model.dynamic((BATCH, heads), torch.int64, (0,)))
        gm = self.model.trace(run, ids, position, *caches)
        state = State("decode", None)  # type: ignore[arg-type]
        self._rewrite(gm, state)
        attend_slots(Editor(gm), state)
        if self.prompt is not None:
            score_step(gm, state, self.prompt)
        return self._finish(gm)

    def _rewrite(self, gm: fx.GraphModule, state: State) -> None:
        Canonicalize().run(gm, state)
        Annotate().run(gm, state)
        if len(state.sites) != self.layers:
            raise Refusal(f"the draft has {self.layers} layers and {len(state.sites)} recognised attention sites")
        if state.kind == "short":
            self.draft_layers = [
                (site.kv_heads, *(int(node.meta["val"].shape[3]) for node in (site.key, site.value)))
                for site in state.sites
            ]

    def _finish(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.meta["specpass_symbols"] = self.model.sizes
        gm.recompile()
        return gm
