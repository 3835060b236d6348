"""Backend: the torch.compile backend that ties capture, passes, lowering and runtime together."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from specpass.backend import checks
from specpass.backend.calls import Call, owner_of
from specpass.backend.limit import ensure_limit, raised_limit
from specpass.cache.budget import BudgetCache
from specpass.capture.draft import capture_draft
from specpass.capture.dynamo import holds_cache_ops, restart_if_specialised, trace_aten
from specpass.dialect.cache import AppendKv, Fill
from specpass.dialect.define import SPEC
from specpass.errors import (
    GradientsError,
    LookaheadError,
    MethodMismatchError,
    PartialGraphError,
    SpecpassError,
    UnsupportedCallError,
)
from specpass.graph.roles import named_inputs
from specpass.graph.walk import ATEN, find, is_op, output_of, value
from specpass.lowering.lower import lower, prepare
from specpass.methods.base import Method
from specpass.passes.base import Refusal, State
from specpass.passes.draft import DraftGraphs
from specpass.passes.pipeline import Pipeline
from specpass.reports.record import GraphRecord
from specpass.reports.report import Report
from specpass.sizes import context_length, eos_ids


class Backend:
    """A torch.compile backend: `target.compile(backend=Backend(draft=draft, method=method), dynamic=True)`.

    Args:
        draft: a Hugging Face decoder with the target's tokenizer; None for methods without one.
        method: e.g. SpecKV(budget=1024).
        lowering: "inductor" compiles each distinct decoder layer once; "eager" runs the same passes uncompiled.
        cudagraphs: replay each decode step as one CUDA graph.
        lookahead_ids: [B, L] token ids in place of the draft's.
        skip_passes: names of passes to leave out, for experiments.
        full_verify: propagate fake values through the whole graph after each pass.
        keep_stages: keep copies of the graphs of these stages ("DRAFTED", "PRUNED") in `backend.stages`.

    Raises:
        MissingDraftError, GradientsError, EncoderDecoderError, NoCudaError: see specpass.errors.
    """

    backend_ctx_ctor = staticmethod(raised_limit)  # Dynamo enters it around each call

    def __init__(
        self,
        draft: nn.Module | None = None,
        method: Method | None = None,
        *,
        lowering: str = "inductor",
        cudagraphs: bool = False,
        lookahead_ids: Any = None,
        skip_passes: Iterable[str] = (),
        full_verify: bool = False,
        keep_stages: Iterable[str] = (),
    ) -> None:
        method = checks.check_method(method)
        if lookahead_ids is not None:
            method = with_lookahead_ids(method, lookahead_ids)
        checks.check_draft(draft, method)
        checks.check_lowering(lowering)
        checks.check_cudagraphs(cudagraphs)
        self.draft, self.method, self.lowering, self.cudagraphs = draft, method, lowering, cudagraphs
        self.skip_passes, self.full_verify = tuple(skip_passes), full_verify
        Pipeline(self.skip_passes)  # unknown names are an error now, not at the first call
        self.keep_stages = tuple(keep_stages)
        self.stages: dict[str, fx.GraphModule] = {}
        self.report = Report(method, lowering, getattr(draft, "config", None))
        self._graphs: DraftGraphs | None = None
        self.__name__ = "specpass"
        prepare(lowering)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        ensure_limit()
        if find(gm.graph, SPEC.extend_kv):  # goes on from a prompt that was kept whole
            return gm.forward
        if not holds_cache_ops(gm):
            self._warn_foreign(gm)
            return gm.forward
        restart_if_specialised(gm, example_inputs)
        start = time.perf_counter()
        try:
            call = self._compile(gm, example_inputs)
        except SpecpassError as error:
            # Raised by the call itself: Dynamo would wrap an error of the backend in one of its own.
            return _raiser(error)
        self.report.graphs[-1].seconds = time.perf_counter() - start
        return call

    def _warn_foreign(self, gm: fx.GraphModule) -> None:
        if not self.report.foreign:
            warnings.warn(
                "specpass: this call does not use a BudgetCache, so the model runs exactly, unpruned. Pass "
                "past_key_values=specpass.BudgetCache(model.config, method).",
                stacklevel=2,
            )
        self.report.foreign += 1

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Call:
        start = time.perf_counter()
        traced = trace_aten(gm)
        trace_seconds = time.perf_counter() - start
        writes = find(traced.graph, SPEC.fill, SPEC.append_kv)
        inputs = traced.graph.find_nodes(op="placeholder")
        places = {"handle": inputs.index((Fill.match(writes[0]) or AppendKv.of(writes[0])).handle)}
        cache = owner_of(example_inputs[places["handle"]])
        self.report.saw(cache.config)
        self._check_cache(cache)
        named = named_inputs(traced)
        places |= {name: inputs.index(node) for name, node in named.items()}
        self._check_whole(traced, writes, cache, named)
        self._check_call(traced, cache)
        weights = {node: value for node, value in zip(inputs, example_inputs, strict=True) if isinstance(value, Tensor)}
        state = State(kind_of(writes), dataclasses.replace(cache.method), inputs=named, weights=weights)
        record = GraphRecord(state.kind, trace_seconds=trace_seconds)
        self.report.graphs.append(record)
        try:
            graph = self._rewrite(traced, state, cache, record)
        except Refusal as refusal:
            self.report.refuse(str(refusal))
            record.exact = True
            exact = trace_aten(gm)
            for fill in Fill.find(exact.graph):  # everything is kept and nothing else: no free slots
                fill.update(room=0)
            lowered = lower(exact, "eager")
            record.add(lowered)
            return Call(lowered.run, state.kind, places, refusal=str(refusal))
        record.sites = [(site.module, site.budget) for site in state.sites]
        # Before lowering replaces the operators that say so. Unlike budgets stay symbols: one region serves all layers.
        alike = len({budget for _, budget in record.sites}) == 1
        static = static_outputs(graph) if alike else {}
        fingerprint = Pipeline(self.skip_passes).fingerprint()
        lowered = lower(
            graph, self.lowering, decode=state.kind == "decode", cudagraphs=self.cudagraphs, fingerprint=fingerprint
        )
        record.add(lowered)
        context = None if state.draft is None else context_length(self.draft.config)  # type: ignore[union-attr]
        return Call(
            lowered.run,
            state.kind,
            places,
            tuple(state.lifted.values()),
            static,
            context,
            state.lookahead,
            packed="attention_mask" in named and state.kind in ("prefill", "short"),
        )

    def _rewrite(self, traced: fx.GraphModule, state: State, cache: BudgetCache, record: GraphRecord) -> fx.GraphModule:
        for index, kind in enumerate(cache.layer_types):
            if kind != "full_attention":
                raise Refusal(f"layer {index} is configured as {kind}; only full attention is pruned")
        if "inputs_embeds" in state.inputs and state.kind in ("prefill", "short"):
            raise Refusal("the prompt came as inputs_embeds, so there are no token ids for the draft to read")
        if state.kind == "prefill":
            state.lookahead = cache.lookahead
            if state.lookahead and cache.given_ids is None:
                state.draft = self.draft_graphs(cache)
            state.eos_ids = self._eos_ids(cache)
        pipeline = Pipeline(self.skip_passes, self.full_verify)
        graph = pipeline.run(traced, state, self.keep_stages)
        record.pass_seconds = dict(pipeline.seconds)
        if state.kind == "prefill":
            self.stages.update(pipeline.stages)
        return graph

    def _eos_ids(self, cache: BudgetCache) -> tuple[int, ...]:
        source = self.draft.generation_config if self.draft is not None else cache.config
        return eos_ids(source)

    def draft_graphs(self, cache: BudgetCache) -> DraftGraphs:
        """The draft's two graphs, captured once."""
        if self._graphs is None:
            checks.check_draft(self.draft, self.method)  # train() may have been called since
            start = time.perf_counter()
            try:
                self._graphs = capture_draft(self.draft, self.method.prompt)
            except Refusal as refusal:
                raise Refusal(f"the draft cannot be captured: {refusal}") from refusal
            self.report.draft_seconds = time.perf_counter() - start
        method: Any = cache.method
        return dataclasses.replace(
            self._graphs, temperature=method.temperature, seed=method.seed, target_vocab=cache.config.vocab_size
        )

    def _check_cache(self, cache: BudgetCache) -> None:
        mine = dataclasses.replace(self.method, budget=cache.method.budget)
        same_budget = isinstance(self.method.budget, float) or self.method.budget == cache.method.budget
        ours, theirs = (
            dataclasses.replace(m, lookahead_ids=None, lookahead=None) if m.appends else m  # type: ignore[call-arg]
            for m in (mine, cache.method)
        )
        if ours != theirs or not same_budget:
            raise MethodMismatchError(
                f"the cache was made for {cache.method.key} and the backend for {self.method.key}: pass the same "
                "method to both."
            )

    def _check_whole(self, traced: fx.GraphModule, writes: list[fx.Node], cache: BudgetCache, named: dict) -> None:
        layers = len(cache.layers)
        logits = [
            node
            for node in output_of(traced.graph).args[0]
            if node.meta["val"].dim() == 3 and not is_op(node.args[0] if node.args else None, SPEC.fill)
        ]
        if len(writes) != layers or not ({"input_ids", "inputs_embeds"} & named.keys()) or not logits:
            raise PartialGraphError(
                f"a graph break left specpass with {len(writes)} of {layers} layers in this graph: pruning needs the "
                "whole forward in one graph. Find the break with TORCH_LOGS=graph_breaks and remove it."
            )
        if find(traced.graph, ATEN.cross_entropy_loss, ATEN.nll_loss):
            raise UnsupportedCallError("labels= were given: a pruned prefill has no loss; call the model without them.")

    def _check_call(self, traced: fx.GraphModule, cache: BudgetCache) -> None:
        embedding = find(traced.graph, ATEN.embedding)
        if embedding and self.method.drafts and self._graphs is None:
            checks.check_pair(cache.config, embedding[0].args[0].meta["val"], self.draft)
        for node in find(traced.graph, ATEN.dropout, ATEN.scaled_dot_product_attention):
            training = node.args[2] if is_op(node, ATEN.dropout) else len(node.args) > 4 and node.args[4] > 0
            if training:
                raise GradientsError(
                    "the target is in training mode (dropout is on), and pruning has no backward: call target.eval()."
                )


def with_lookahead_ids(method: Method, lookahead_ids: Any) -> Method:
    """The method with the caller's [B, L] token ids in the draft's place."""
    if not method.appends or method.prompt is not None:
        raise LookaheadError(
            f"lookahead_ids were given, but {method.name} cannot use them in the draft's place: use SpecKV."
        )
    return dataclasses.replace(method, lookahead=None, lookahead_ids=lookahead_ids)  # type: ignore[call-arg]


def _raiser(error: SpecpassError) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def kind_of(writes: list[fx.Node]) -> str:
    """prefill, short, decode or append: said by the cache's own operators, not by the query length."""
    fill = Fill.match(writes[0])
    if fill is not None:
        return "short" if fill.short else "prefill"
    size = value(AppendKv.of(writes[0]).key).shape[2]
    return "decode" if isinstance(size, int) and size == 1 else "append"


def static_outputs(gm: fx.GraphModule) -> dict[int, tuple[int, ...]]:
    """Outputs that are the cache's storage, with the axes that decode may take as constants."""
    axes = {0: (1, 2), 1: (1, 2), 2: (1,)}
    found = {}
    for index, node in enumerate(output_of(gm.graph).args[0]):
        if isinstance(node, fx.Node) and node.args and is_op(node.args[0], SPEC.gather_kv):
            found[index] = axes[node.args[1]]
    return found
