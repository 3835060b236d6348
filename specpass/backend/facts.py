"""What the backend reads of a traced graph: once, before any pass; later it asks the graph nothing."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor, fx
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from specpass.backend.calls import owner_of
from specpass.cache import BudgetCache
from specpass.cache.states import recurrent_layer
from specpass.dialect.cache import AppendKv, Fill, GatherKv, GatherRagged, HeadOffsets, QuantizeKv, ShareLayers
from specpass.dialect.select import AddLookahead, SelectRungs
from specpass.errors import GradientsError, PartialGraphError, UnsupportedCallError
from specpass.graph.aten import Dropout, Embedding, Sdpa
from specpass.graph.operands import GetItem, results_of
from specpass.graph.roles import ROLES, has_axes, named_inputs
from specpass.graph.walk import ATEN, find, is_op, value
from specpass.passes.facts import Inputs, Weights
from specpass.rewrite import Kind


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced graph and what is known of it.

    Attributes:
        kind: said by the cache's own operators, not by the query length.
        cache: the BudgetCache that was traced into it.
        places: index of the inputs handle, input_ids, attention_mask, position_ids, ... among Dynamo's inputs.
        inputs, weights: facts for the passes.
        embedding: the fake weight of the first embedding, or None.
        axes: position ids come as [P, B, S], one for each of several axes (mrope).
    """

    gm: fx.GraphModule
    kind: Kind
    cache: BudgetCache
    places: dict[str, int]
    inputs: Inputs
    weights: Weights
    embedding: Tensor | None
    axes: bool

    @classmethod
    def read(cls, gm: fx.GraphModule, example_inputs: list[Any]) -> Traced:
        """Raises: PartialGraphError, UnsupportedCallError, GradientsError: the graph cannot be pruned as it is."""
        writes: list[Fill | AppendKv] = [*Fill.find(gm.graph), *AppendKv.find(gm.graph)]
        placeholders = gm.graph.find_nodes(op="placeholder")
        handle = writes[0].handle
        assert handle is not None
        cache = owner_of(example_inputs[placeholders.index(handle)])
        order = argument_names(cache.config)
        named = named_inputs(gm, order)
        places = {"handle": placeholders.index(handle)} | {r: placeholders.index(node) for r, node in named.items()}
        inputs = Inputs.of(named)
        check_kinds(cache)
        check_whole(gm, len(writes), len(cache.budgeted), inputs)
        check_inference(gm)
        weights = {
            node: example
            for node, example in zip(placeholders, example_inputs, strict=True)
            if isinstance(example, Tensor)
        }
        embedding = next(iter(Embedding.find(gm.graph)), None)
        return cls(
            gm,
            kind_of(writes[0]),
            cache,
            places,
            inputs,
            Weights(weights),
            None if embedding is None else value(embedding.weight),
            has_axes(gm, order),
        )


def argument_names(config: Any) -> tuple[str, ...]:
    """Names of a decoder's arguments in their order, which is not the same for all (GPT-2 takes its cache second)."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return ROLES if model is None else tuple(inspect.signature(model.forward).parameters)[1:]


def kind_of(write: Fill | AppendKv) -> Kind:
    """prefill, short, decode or append."""
    if isinstance(write, Fill):
        return "short" if write.short else "prefill"
    size = value(write.key).shape[2]
    return "decode" if isinstance(size, int) and size == 1 else "append"


def check_kinds(cache: BudgetCache) -> None:
    """Raises: UnsupportedCallError: some layer recurs."""
    found = recurrent_layer(cache.config)
    if found:
        raise UnsupportedCallError(
            f"{found}, whose state has no form in a graph: use specpass.compile(model, ...), which prunes such a model "
            "around its own forward."
        )


def check_whole(gm: fx.GraphModule, writes: int, layers: int, inputs: Inputs) -> None:
    """Raises: PartialGraphError: the graph is not the whole forward. UnsupportedCallError: it ends in a loss."""
    results = [node for node in results_of(gm.graph) if isinstance(value(node), Tensor)]
    logits = [node for node in results if value(node).dim() == 3 and not is_written(node)]
    if writes != layers or (inputs.ids is None and inputs.embeds is None) or not logits:
        raise PartialGraphError(
            f"a graph break left specpass with {writes} of {layers} layers in this graph: pruning needs the "
            "whole forward in one graph. Find the break with TORCH_LOGS=graph_breaks and remove it, or use "
            "specpass.compile(model, ...), which prunes around the model's own forward."
        )
    if find(gm.graph, ATEN.cross_entropy_loss, ATEN.nll_loss):
        raise UnsupportedCallError("labels= were given: a pruned prefill has no loss; call the model without them.")


def is_written(node: fx.Node) -> bool:
    """Whether a result is a layer's storage, and not the model's own."""
    item = GetItem.match(node)
    return item is not None and (Fill.is_call(item.source) or QuantizeKv.is_call(item.source))


def check_inference(gm: fx.GraphModule) -> None:
    """Raises: GradientsError: dropout is on."""
    trains = any(dropout.train for dropout in Dropout.find(gm.graph))
    if trains or any(attention.dropout_p > 0 for attention in Sdpa.find(gm.graph)):
        raise GradientsError(
            "the target is in training mode (dropout is on), and pruning has no backward: call target.eval()."
        )


def candidate_outputs(gm: fx.GraphModule) -> list[dict[str, int]]:
    """Outputs of a PRUNED graph whose budget is chosen behind it: each layer's candidates, by name."""
    found: dict[fx.Node, dict[str, int]] = {}
    for index, node in enumerate(results_of(gm.graph)):
        item = GetItem.match(node.all_input_nodes[0] if is_op(node, ATEN.sub) else node)
        if item is None:
            continue
        rungs, name = item.source, ("positions", "rung", "shares")
        if (gather := GatherKv.match(item.source)) is not None:
            ahead = AddLookahead.match(gather.positions)
            chosen = GetItem.match(gather.positions if ahead is None else ahead.positions)
            rungs, name = (None if chosen is None else chosen.source), ("keys", "values", "lengths")
        if SelectRungs.is_call(rungs):
            found.setdefault(rungs, {})[name[item.index]] = index
    return list(found.values())


def quantized_axes(alike: bool) -> tuple[tuple[int, ...], ...]:
    """Constants of codes [B, K, n, bytes], counts [B, K] and basis [B, K, r, D + Dv]; n where layers are `alike`."""
    return ((1, 2, 3) if alike else (1, 3)), (1,), (1, 2, 3)


def static_outputs(gm: fx.GraphModule, alike: bool) -> dict[int, int | tuple[int, ...]]:
    """Outputs of a PRUNED graph that are the cache's storage, with the axis of D (keys, values) or K (the others).

    Of a quantised prompt see quantized_axes. Args: alike: whether all layers have one budget.
    """
    own = quantized_axes(alike)
    axes: dict[int, int | tuple[int, ...]] = {0: 2, 1: 2, 2: 1, 3: own[0], 4: own[1], 5: own[2]}
    found: dict[int, int | tuple[int, ...]] = {}
    for index, node in enumerate(results_of(gm.graph)):
        item = GetItem.match(node) or (GetItem.match(node.all_input_nodes[0]) if is_op(node, ATEN.sub) else None)
        if item is None:
            continue
        source, shared = item.source, GetItem.match(item.source)
        storing = any(view.is_call(source) for view in (GatherKv, GatherRagged, QuantizeKv))
        if storing or (ShareLayers.is_call(source) and item.index < 2):
            found[index] = axes[item.index]
        elif HeadOffsets.is_call(source) or (shared is not None and ShareLayers.is_call(shared.source)):
            found[index] = 1
    return found
