"""The target as the two graphs that ONNX gets: the PRUNED graphs of torch.compile's own pipeline.

The BudgetCache of torch.compile is traced (see capture/model.py), so the passes meet the same operators.
No mask reaches the model: pack_rows makes one length per row of it, and packed rows need none.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx, nn

from specpass.cache.budget import BudgetCache
from specpass.capture.draft import capture_draft
from specpass.capture.model import BATCH, SLOTS, ModelTrace, asks_for_length
from specpass.dialect.cache import AppendKv
from specpass.export.decode import decode_program
from specpass.export.draft_loop import DraftSteps, LoopedDraft
from specpass.export.exact import Exact
from specpass.export.flatten import Inliner, flatten
from specpass.export.forms import by_head, split_lookahead
from specpass.export.heads import Heads
from specpass.export.name_nodes import named
from specpass.export.program import Capture, Program, names
from specpass.graph.walk import value
from specpass.methods.base import Method, Scored
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Ahead, Inputs, Spans, Weights
from specpass.passes.pipeline import PASSES
from specpass.rewrite import Facts, Pipeline, Refusal, Request
from specpass.rewrite.sites import Sites
from specpass.runtime.replay import LOOKAHEAD_LOGITS
from specpass.sizes import eos_ids, layer_spans


def capture_target(
    target: nn.Module, method: Method | None, draft: nn.Module | None, unrolled: bool = False
) -> Capture:
    """Both graphs of `target`; method None keeps every KV pair.

    Args: unrolled: the draft's steps as copies instead of a loop (to measure what a loop saves).
    Raises: Refusal naming the layer that no pass understands.
    """
    return Exact(target).capture() if method is None else Pruned(target, method, draft, unrolled).capture()


class Pruned:
    """Prefill and decode through the pipeline."""

    def __init__(self, target: nn.Module, method: Method, draft: nn.Module | None, unrolled: bool) -> None:
        self.model, self.method, self.draft, self.unrolled = ModelTrace(target), method, draft, unrolled
        self.verify = method.verify
        self.config = target.config.get_text_config(decoder=True)
        self.spans = layer_spans(self.config)
        self.layers = len(self.spans)
        self.kv: list[tuple[int, int, int]] = []  # K, D, Dv of each layer, known once the prefill is captured
        self.slots: list[int] = []  # of each layer's heads for the prompt, known likewise
        self.weights = {f"target.{name}": tensor for name, tensor in self.model.params.items()}

    def capture(self) -> Capture:
        prefill = self._prefill()
        return Capture(prefill, self._decode(), self.kv)

    def _cache(self, method: Method | None = None) -> BudgetCache:
        # A prompt that fits the budget goes through selection too: one graph serves every length.
        cache = BudgetCache(self.config, method or self.method, early_exit=False)
        # The runtime owns the free slots, but for those in which the lookahead waits.
        cache.room, cache.in_slots = cache.lookahead if self.verify else 0, asks_for_length(self.model.model)
        if None in self.spans:
            raise Refusal(f"layer {self.spans.index(None)} is no attention layer")
        return cache

    def _prefill(self) -> Program:
        outputs = ["logits", *names("present", self.layers), *(f"positions.{i}" for i in range(self.layers))]
        told = [
            name
            for name, there in (
                ("lookahead_ids", self.method.drafts),
                ("prompt_positions", self.method.prompt is not None),
                ("shift", self.method.prompt is not None),
            )
            if there
        ]
        extra = list(told)

        def run(ids: Tensor, mask: Tensor, *params: Tensor) -> list[Tensor]:
            cache = self._cache()
            logits = self.model.forward(params, ids, cache)
            states = [states for layer in cache.layers for states in (layer.key_buffer, layer.value_buffer)]
            positions = [layer.kept_positions for layer in cache.layers]
            places = [place for layer in cache.layers if layer.ragged for place in (layer.starts, layer.counts)]
            return [logits, *states, *positions, *places, *(getattr(cache, name) for name in told)]

        model = self.model
        with model.mode:
            mask = model.ids.new_ones(model.ids.shape)
        gm = model.trace(run, model.ids, mask)
        ids, mask_node, *params = gm.graph.find_nodes(op="placeholder")
        weights = Weights(dict(zip(params, self.model.params.values(), strict=True)))
        facts = Facts(Inputs(ids, mask_node), weights, Spans(self.spans))
        if self.draft is not None:
            facts.add(self._draft(self.draft))
        source = self.draft.generation_config if self.draft is not None else self.config
        request = Request("prefill", self.method, self._cache().lookahead, eos_ids(source), self.verify)
        Pipeline(PASSES).run(gm, request, facts)
        if self.verify and not facts[Ahead].tokens:  # the model's head cannot be written for the lookahead's rows
            self.verify = False
            return self._prefill()
        if self.verify:
            extra += [LOOKAHEAD_LOGITS, *names("lookahead", self.layers)]
        pruned = named_submodules(named(gm, "prefill"))
        biased = next((site for site in facts[Sites].sites if site.alibi is not None), None)
        if biased is not None:
            raise Refusal(
                "a bias is added to its attention logits (ALiBi), and an exported step is not told the positions of "
                "kept keys: export it without a method",
                biased.module,
            )
        self.kv.extend(site.kv_shape for site in facts[Sites].sites)
        self.spans = tuple(site.span for site in facts[Sites].sites)
        cache = self._cache()
        ahead = cache.room
        spread = {
            index: Heads.of(layer, site.kv_heads, site.budget, site.is_full)
            for index, (layer, site) in enumerate(zip(cache.layers, facts[Sites].sites, strict=True))
            if layer.ragged
        }
        self.slots = [
            spread[index].most if index in spread else layer.budget for index, layer in enumerate(cache.layers)
        ]
        draft = facts.get(DraftGraphs)
        drafted = {} if draft is None else {f"draft.{name}": tensor for name, tensor in draft.params.items()}

        def plain(*args: Tensor) -> tuple[Tensor, ...]:
            inner = Inliner(pruned)
            out = list(inner.run(*args))
            stored, positions = 2 * self.layers + 1, 3 * self.layers + 1
            places = iter([out.pop(positions) for _ in range(2 * len(spread))])
            for layer, (kv_heads, _, _) in enumerate(self.kv):
                keys, values, kept = 1 + 2 * layer, 2 + 2 * layer, stored + layer
                if layer in spread:
                    flat = out[keys], out[values], out[kept]
                    out[keys], out[values], out[kept] = spread[layer].padded(*flat, next(places), next(places), ahead)
                else:  # storage [B, K * C, D] as [B, K, C, D]
                    out[keys], out[values] = (by_head(out[index], kv_heads) for index in (keys, values))
            if self.verify:
                owners = [layer for layer in out[stored:positions] for _ in ("key", "value")]
                both = [split_lookahead(*pair) for pair in zip(out[1:stored], owners, strict=True)]
                out[1:stored] = [kept for kept, _ in both]
                out += [waiting for _, waiting in both]
            return tuple(out)

        # The prompt's length is the symbol itself here; to the pipeline the symbol means S + L.
        values = [value(node) for node in pruned.graph.find_nodes(op="placeholder")[2:]]
        flat = flatten(pruned, plain, [model.ids, mask, *values], "prefill")
        return Program(flat, ("input_ids", "attention_mask"), (*outputs, *extra), self.weights | drafted)

    def _draft(self, draft: nn.Module) -> DraftGraphs:
        try:
            graphs = capture_draft(draft, self.method)
        except Refusal as refusal:
            raise Refusal(f"the draft cannot be captured: {refusal}") from refusal
        kind = DraftGraphs if self.unrolled else LoopedDraft
        fields = {field.name: getattr(graphs, field.name) for field in dataclasses.fields(graphs)}
        return kind(
            **fields
            | {"temperature": self.method.temperature, "seed": self.method.seed, "target_vocab": self.config.vocab_size}
        )

    def _decode(self) -> Program:
        model, layers, method, budgets = self.model, self.layers, self.method, self.slots
        if isinstance(method, Scored):  # M slots for each head, whose length says what of them is in use
            method = dataclasses.replace(method, spread="uniform")

        def run(ids: Tensor, position: Tensor, *rest: Tensor) -> Tensor:
            cache, params = self._cache(method), rest[3 * layers :]
            for layer, group in zip(cache.layers, zip(*[iter(rest[: 3 * layers])] * 3, strict=True), strict=True):
                layer.key_buffer, layer.value_buffer, layer.lengths = group
                layer.is_initialized = True
            cache.seen = group[2].max()
            cache.free_at_prefill = SLOTS
            return model.forward(params, ids, cache, position_ids=position)

        ids, position = (model.dynamic((BATCH, 1), torch.int64, (0,)) for _ in range(2))
        caches = []
        for (heads, dim, value_dim), budget in zip(self.kv, budgets, strict=True):
            slots = SLOTS + budget - max(budgets)  # unlike budgets are unlike symbols
            caches += [model.dynamic((BATCH, heads * slots, width), model.dtype, (0, 1)) for width in (dim, value_dim)]
            caches.append(model.dynamic((BATCH, heads), torch.int64, (0,)))
        gm = model.trace(run, ids, position, *caches)
        Pipeline(PASSES).run(gm, Request("decode", method), Facts(Spans(self.spans)))
        return decode_program(gm, self.kv, self.weights)


def named_submodules(gm: fx.GraphModule) -> fx.GraphModule:
    """The draft's nodes are named by its module paths behind `draft.`"""
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(gm, name, named(child, "decode" if AppendKv.find(child.graph) else "prefill", "draft"))
        elif isinstance(child, DraftSteps):
            child.draft = dataclasses.replace(child.draft, step=named(child.draft.step, "decode", "draft"))
    return gm
