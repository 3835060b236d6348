"""Graphs of tiny models as they are traced, once for all tests, without Dynamo: of a prompt, a step, a draft."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from graphs import KV_HEADS, PARTS, WIDTH, Traced
from tiny import tiny
from torch import Tensor, fx

import specpass
from specpass.capture.draft import _Capture, capture_draft
from specpass.capture.model import BATCH, SLOTS, ModelTrace
from specpass.graph.edit import copy_module
from specpass.methods.base import Method
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Inputs, Rows, Spans, Weights
from specpass.passes.score_draft import StepRows
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.sizes import FULL

NEWEST = 4  # queries W that a layer has room for


@functools.cache
def draft(method: Method | None = None, layers: int = 1) -> DraftGraphs:
    """The captured draft of the tests (`tiny(seed=1)`), which looks ahead in prompts' graphs."""
    return capture_draft(tiny(seed=1, layers=layers), method)


@functools.cache
def prompt_graph(
    method: Method,
    *,
    kind: Kind = "prefill",
    mask: bool = False,
    positions: bool = False,
    keep: int = 1,
    verify: bool = False,
    family: str = "llama",
    layers: int = 1,
    **config: Any,
) -> Traced:
    """(input_ids [B, S], handle [], [attention_mask [B, S]], [position_ids [B, S]], [given_ids [B, L]], *parameters).

    It returns logits, what a cache's layers hold, and the cache's own tensors: see `results`.

    Args:
        mask: the model is told of padding. positions: it is given position ids. keep: logits_to_keep.
        verify: the logits behind the lookahead are wanted (the last result, "ahead").
        config: further arguments of `tiny`.
    """
    model = tiny(family, layers=layers, **config)
    trace, ahead = ModelTrace(model), method.drafts and kind == "prefill"
    drafts = ahead and method.needs_draft
    with trace.mode:
        inputs = {"handle": torch.zeros((), dtype=torch.int64)}
        inputs |= {"attention_mask": trace.ids.new_ones(trace.ids.shape)} if mask else {}
        inputs |= {"position_ids": trace.ids.new_ones(trace.ids.shape)} if positions else {}
        inputs |= {"given_ids": torch.tensor(method.lookahead_ids)} if method.lookahead_ids is not None else {}
    extra = ["lookahead_ids"] if ahead else []
    extra += ["prompt_positions", "shift"] if method.prompt is not None else []

    def run(ids: Tensor, *rest: Tensor) -> list[Any]:
        named = dict(zip(inputs, rest, strict=False))
        cache = new_cache(model, method, kind)
        cache.handle, cache.given_ids = named.pop("handle"), named.pop("given_ids", None)
        logits = trace.forward(rest[len(inputs) :], ids, cache, logits_to_keep=keep, **named)
        parts = [getattr(layer, part) for layer in cache.layers for part in parts_of(method)]
        return [logits, *parts, cache.seen, *(getattr(cache, name) for name in extra)]

    gm = trace.trace(run, trace.ids, *inputs.values())
    name_inputs(gm, ["input_ids", *inputs, *trace.params])
    given = tuple(trace.params.values())

    def facts(places: list[fx.Node]) -> Facts:
        named = dict(zip(("input_ids", *inputs), places, strict=False))
        weights = Weights(dict(zip(places[1 + len(inputs) :], given, strict=True)))
        return Facts(Inputs.of(named), weights, *([draft(method.prompt)] if drafts else []))

    request = Request(kind, method, new_cache(model, method, kind).lookahead if ahead else 0, verify=verify)
    stored = (f"{part}.{layer}" for layer in range(layers) for part in parts_of(method))
    results = ("logits", *stored, "seen", *extra)
    return Traced(gm, request, facts, results, given)


@functools.cache
def step_graph(
    method: Method,
    *,
    kind: Kind = "decode",
    mask: bool = False,
    positions: bool = False,
    shift: bool = False,
    queries: bool = False,
    layers: int = 1,
) -> Traced:
    """Of one token, or (append) of several, written in place behind a prompt:

    (input_ids [B, q], handle [], seen [], [shift [B]], [attention_mask [B, q]], [position_ids [B, q]], key_buffer,
    value_buffer, lengths of each layer, *parameters) -> logits.

    Args:
        mask: the model is told which of these tokens are padding. positions: position ids are given.
        shift: the cache holds one (SpecPC). queries: layers have room for the newest ones, behind their lengths.
    """
    model = tiny(layers=layers)
    trace, budgets = ModelTrace(model), method.layer_budgets(layers)
    ids = trace.ids if kind == "append" else trace.dynamic((BATCH, 1), torch.int64, (0,))
    with trace.mode:
        inputs = {"handle": torch.zeros((), dtype=torch.int64), "seen": torch.zeros((), dtype=torch.int64)}
        inputs |= {"shift": ids.new_zeros(ids.shape[0])} if shift else {}
        inputs |= {"attention_mask": ids.new_ones(ids.shape)} if mask else {}
        inputs |= {"position_ids": ids.new_ones(ids.shape)} if positions else {}
    caches = {}
    for layer, budget in enumerate(budgets):
        slots = KV_HEADS * (SLOTS + budget - max(budgets))  # unlike budgets are unlike symbols
        for part in PARTS[:2]:
            caches[f"{part}.{layer}"] = trace.dynamic((BATCH, slots, WIDTH), trace.dtype, (0, 1))
        for part in ("lengths", *parts_of(method)[4:]):
            caches[f"{part}.{layer}"] = trace.dynamic((BATCH, KV_HEADS), torch.int64, (0,))

        if queries:
            room = (BATCH, model.config.num_attention_heads, NEWEST, WIDTH)
            caches[f"queries.{layer}"] = trace.dynamic(room, trace.dtype, (0,))

    def run(ids: Tensor, *rest: Tensor) -> list[Tensor]:
        named = dict(zip((*inputs, *caches), rest, strict=False))
        cache = new_cache(model, method, kind)
        cache.handle, cache.seen, cache.shift = named["handle"], named["seen"], named.get("shift")
        cache.free_at_prefill = SLOTS
        for index, layer in enumerate(cache.layers):
            for part in (*PARTS[:3], *parts_of(method)[4:], *(["queries"] if queries else [])):
                setattr(layer, part, named[f"{part}.{index}"])
            layer.is_initialized = True
        told = {name: named[name] for name in ("attention_mask", "position_ids") if name in named}
        return [trace.forward(rest[len(inputs) + len(caches) :], ids, cache, **told)]

    gm = trace.trace(run, ids, *inputs.values(), *caches.values())
    name_inputs(gm, ["input_ids", *inputs, *caches, *trace.params])

    def facts(places: list[fx.Node]) -> Facts:
        return Facts(Inputs.of(dict(zip(("input_ids", *inputs), places, strict=False))))

    return Traced(gm, Request(kind, method), facts, ("logits",), tuple(trace.params.values()))


@functools.cache
def draft_graphs(method: Method | None = None, layers: int = 1) -> dict[str, Traced]:
    """The draft's own graphs, prefill and decode, as capture finds them before its passes."""
    prompt = None if method is None else method.prompt
    found: dict[str, Traced] = {}
    caches = [f"{part}.{layer}" for layer in range(layers) for part in PARTS[:3]]
    told = [] if prompt is None else ["rows", "prompt_lengths"]
    inputs = {"prefill": ["ids", "prompt_lengths", "room"], "decode": ["ids", "position", *told, *caches]}

    class Recording(_Capture):
        def _rewrite(self, gm: fx.GraphModule, passes: tuple[Pass, ...], kind: Kind, facts: Facts) -> None:
            read = {"prefill": prefill_facts, "decode": step_facts}[kind]
            given = tuple(self.model.params.values())
            name_inputs(gm, [*inputs[kind], *self.model.params])
            found[kind] = Traced(copy_module(gm), Request(kind, model="draft"), read, (), given, passes)
            super()._rewrite(gm, passes, kind, facts)

    def prefill_facts(places: list[fx.Node]) -> Facts:
        weights = Weights(dict(zip(places[3:], capture.model.params.values(), strict=True)))
        return Facts(Inputs(places[0]), Rows(places[1]), weights)

    def step_facts(places: list[fx.Node]) -> Facts:
        return Facts() if prompt is None else Facts(StepRows(*places[2:5]))

    capture = Recording(ModelTrace(tiny(seed=1, layers=layers)), Spans((FULL,) * layers))
    capture.prefill(method)
    capture.step(prompt)
    return {
        "prefill": dataclasses.replace(found["prefill"], results=("logits", *caches)),
        "decode": dataclasses.replace(found["decode"], results=("logits",)),
    }


def new_cache(model: Any, method: Method, kind: Kind) -> specpass.BudgetCache:
    """An empty cache that takes a prompt for one that fits, or does not, as `kind` says."""
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=8)
    cache.fits = lambda key: kind == "short"  # type: ignore[method-assign]  # the traced size is a stand-in
    return cache


def parts_of(method: Method) -> tuple[str, ...]:
    """What a layer of its cache holds: keys, values, lengths, positions, and what says where KV heads begin."""
    return PARTS if method.spread == "uniform" else (*PARTS[:3], "kept_positions", "starts", "counts")


def name_inputs(gm: fx.GraphModule, names: Sequence[str]) -> None:
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        node.name = node.target = name.replace(".", "_")
