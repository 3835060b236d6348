"""Backend: the torch.compile backend that ties capture, passes, lowering and runtime together."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from specpass.backend import checks
from specpass.backend.calls import Call
from specpass.backend.captured import CapturedDraft
from specpass.backend.facts import Traced
from specpass.backend.pruned import Pruned
from specpass.backend.settings import call_settings, ensure_limit
from specpass.cache.budget import BudgetCache
from specpass.cache.evict import Bound
from specpass.capture.devices import spread_over
from specpass.capture.dynamo import holds_cache_ops, restart_if_specialised, trace_aten
from specpass.capture.rope import why_not_fixed
from specpass.dialect.cache import ExtendKv, Fill, QuantizeKv
from specpass.errors import (
    GeneratedError,
    LookaheadError,
    MethodMismatchError,
    ParallelPlanError,
    SpecpassError,
    UnsplicedGraphError,
)
from specpass.graph.edit import Editor, copy_module
from specpass.lowering.fuse import FUSION
from specpass.lowering.lower import lower, prepare
from specpass.methods.base import DRAFTLESS, Method
from specpass.parallel.shards import Ranks, is_spread
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Drafted, RotationAsked, Spans
from specpass.passes.gather_prune import leave_unquantized
from specpass.passes.pipeline import PASSES, fingerprint
from specpass.reports.record import GraphRecord
from specpass.reports.report import Report
from specpass.rewrite import Facts, Observer, Pipeline, Refusal, Request
from specpass.rewrite.base import PROMPTS, STEPS, Unspliced
from specpass.rewrite.pipeline import check_names
from specpass.rewrite.sites import Sites
from specpass.sizes import context_length, eos_ids

OTHER_TOKENIZER = "this one has a tokenizer of its own, whose tokens are no queries: use a draft of the same family"


class Backend:
    """A torch.compile backend: `target.compile(backend=Backend(draft=draft, method=method), dynamic=True)`.

    Args:
        draft: a Hugging Face decoder with the target's tokenizer; None for methods without one.
        method: e.g. SpecKV(budget=1024).
        lowering: "inductor" compiles each distinct decoder layer once; "eager" runs the same passes uncompiled.
        cudagraphs: replay decode steps, and the draft's, as one CUDA graph each. None: wherever there is CUDA and they
            can be recorded (the report says where not); True: an error without CUDA.
        lookahead_ids: [B, L] token ids in place of the draft's.
        draft_bits: 8: the draft's steps read copies of its weights in 8 bits, made once, which takes half as long where
            memory is what they wait for (bfloat16, on a CPU). Its lookahead and its proposals may be others; what the
            target says of them is not touched. None: the weights as they are.
        skip_passes: names of passes to leave out, for experiments.
        full_verify: propagate fake values through the whole graph after each pass.
        keep_stages: keep copies of the graphs of these stages ("DRAFTED", "PRUNED") in `backend.stages`.
        observe: called as observe(request, name, graph) with each graph as it was traced ("traced") and after each
            pass, by the pass's name.

    Raises:
        MissingDraftError, GradientsError, EncoderDecoderError, NoCudaError, DraftBitsError: see specpass.errors.
    """

    backend_ctx_ctor = staticmethod(call_settings)  # Dynamo enters it around each call

    def __init__(
        self,
        draft: nn.Module | None = None,
        method: Method | None = None,
        *,
        lowering: str = "inductor",
        cudagraphs: bool | None = None,
        lookahead_ids: Any = None,
        draft_bits: int | None = None,
        skip_passes: Iterable[str] = (),
        full_verify: bool = False,
        keep_stages: Iterable[str] = (),
        observe: Observer | None = None,
    ) -> None:
        method = checks.check_method(method)
        if lookahead_ids is not None:
            method = with_lookahead_ids(method, lookahead_ids)
        checks.check_draft(draft, method)
        checks.check_lowering(lowering)
        checks.check_cudagraphs(cudagraphs)
        self.draft_bits = checks.check_draft_bits(draft_bits, draft, method)
        self.draft, self.method, self.lowering, self.cudagraphs = draft, method, lowering, cudagraphs is not False
        self.skip_passes, self.full_verify = tuple(skip_passes), full_verify
        check_names(self.skip_passes, (*PASSES, *FUSION))  # unknown names are an error now, not at the first call
        self.observers = () if observe is None else (observe,)
        self.keep_stages = tuple(keep_stages)
        self.stages: dict[str, fx.GraphModule] = {}
        self.report = Report(method, lowering, getattr(draft, "config", None))
        self.captured = None if draft is None else CapturedDraft(draft, method, self.draft_bits, self.report)
        self.speculate = 0  # tokens that the draft proposes at a time, through specpass.compile's door
        self.bound: Bound | None = None  # of generated tokens, in the caches that generate() makes
        self.dropped: str | None = None  # where what these caches drop stays, through the same door
        self.bits = 0  # of prompts in them; 0: the model's dtype
        self.eos_of_text: tuple[int, ...] | None = None  # of lookaheads by a draft with another tokenizer (by_text)
        self.second_way = False  # whether calls go through specpass.compile's door, which knows another way
        self.ranks: Ranks | None = None  # that the target is spread over, through specpass.compile's door
        self.keep: Callable[[Pruned], None] | None = None  # told of each rewritten graph (see backend/kept.py)
        self.sizes: set[int] = set()  # of storage, that are constants of decode graphs
        self.__name__ = "specpass"
        prepare(lowering)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        ensure_limit()
        if ExtendKv.find(gm.graph):  # goes on from a prompt that was kept whole
            return gm.forward
        if not holds_cache_ops(gm):
            self._warn_foreign(gm)
            return gm.forward
        if any(map(is_spread, example_inputs)):
            return _raiser(
                ParallelPlanError(
                    "the target's weights are spread over processes, which the plain door does not read: use "
                    "specpass.compile(model, ...)."
                )
            )
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
        graph = trace_aten(gm)
        trace_seconds = time.perf_counter() - start
        traced = Traced.read(graph, example_inputs)
        self.report.saw(traced.cache.config)
        self.check_cache(traced.cache)
        checks.check_weights(weight.device for weight in traced.weights.tensors.values())
        unjoined = self.second_way and self.draft is not None and bool(spread_over(self.draft))
        known = self.captured is not None and self.captured.known
        if traced.embedding is not None and self.method.drafts and not known and not unjoined:
            by_text = self.eos_of_text is not None
            checks.check_pair(traced.cache.config, traced.embedding.device, self.draft, by_text=by_text)
        record = GraphRecord(traced.kind, trace_seconds=trace_seconds)
        self.report.graphs.append(record)
        try:
            return self._prune(traced, record)
        except Refusal as refusal:
            if self.second_way and not self.skip_passes and (isinstance(refusal, Unspliced) or traced.kind in STEPS):
                self.report.graphs.remove(record)
                raise UnsplicedGraphError(str(refusal)) from refusal
            self.report.refuse(str(refusal))
            record.exact = True
            exact = trace_aten(gm)
            for fill in Fill.find(exact.graph):  # everything is kept and nothing else: no free slots
                fill.update(room=0)
            for asked in QuantizeKv.find(exact.graph):
                leave_unquantized(Editor(exact), asked, [asked.keys, asked.values, asked.lengths], asked.node)
            exact.recompile()
            told = {"attention_mask", "position_ids"} <= traced.places.keys()  # steps must be told positions too
            return Call(exact.forward, traced.kind, traced.places, packed=told, refusal=str(refusal))

    def _prune(self, traced: Traced, record: GraphRecord) -> Call:
        """The rewritten, lowered graph.

        Raises: Refusal.
        """
        request, facts = self._request(traced)
        observers = (self._keep_stage, *self.observers)
        pipeline = Pipeline(PASSES, skip=self.skip_passes, full_verify=self.full_verify, observers=observers)
        try:
            graph = pipeline.run(traced.gm, request, facts)
        except Refusal as refusal:
            if Sites in facts:
                raise Unspliced(refusal.reason, refusal.module) from refusal
            raise
        record.pass_seconds = dict(pipeline.seconds)
        sites, drafted = facts.get(Sites), facts.get(Drafted)
        if not self.second_way and sites is not None and any(site.alibi is not None for site in sites.sites):
            raise Refusal(
                "a bias is added to the attention logits (ALiBi), and steps behind a pruned prompt must be told of it: "
                "use specpass.compile(model, ...)"
            )
        if traced.cache.bound is not None and sites is not None and any(site.alibi for site in sites.sites):
            raise GeneratedError(
                f"generated={traced.cache.bound.slots}: attention adds a bias by the positions of its keys (ALiBi), "
                "and those that stay would no longer stand side by side: leave generated out."
            )
        if traced.cache.bound is not None and sites is not None:
            bound, config = traced.cache.bound, traced.cache.config
            bound.check_asks(site.module for site in sites.sites if site.made and site.is_full)
            found = {site.module: site.rotation for site in sites.owners}
            bound.check_turns(config.model_type, found, why_not_fixed(config))
        pruned = Pruned.of(graph, request, facts, traced.places, self.method.spread)
        pruned.context = context_length(self.draft.config) if self.draft is not None and pruned.drafted else None
        pruned.vocab = self.smaller_vocabulary(traced.cache) if pruned.drafted else None
        if self.keep is not None:
            self.keep(pruned)  # before the lowering changes the graph
        return self.lower(pruned, () if drafted is None else tuple(drafted.lifted.values()), record)

    def lower(self, pruned: Pruned, lifted: tuple[Tensor, ...], record: GraphRecord) -> Call:
        """What runs a rewritten graph. Args: lifted: the draft's tensors, behind Dynamo's inputs."""
        record.sites, record.notes = list(pruned.sites), list(pruned.notes)
        lowered = lower(
            pruned.graph,
            self.lowering,
            pruned.request,
            cudagraphs=self.cudagraphs,
            fingerprint=fingerprint(self.skip_passes),
            skip=self.skip_passes,
            observers=self.observers,
            note=self.report.note,
        )
        record.add(lowered)
        return pruned.call(lowered, lifted, self.sizes, self.report, self.ranks)

    def _request(self, traced: Traced) -> tuple[Request, Facts]:
        """What is asked of the passes, and what they are told.

        Raises: Refusal: what the cache's config or the call says cannot be pruned.
        """
        cache, kind = traced.cache, traced.kind
        spans = tuple(getattr(layer, "span", None) for layer in cache.layers)
        ahead = kind == "prefill" and cache.lookahead
        if traced.axes and kind in PROMPTS and ("attention_mask" in traced.places or ahead or cache.compresses):
            raise Refusal(
                "position_ids have several axes, and rows cannot be packed, lengthened or chosen by one of them: use "
                "specpass.compile(model, ...), which takes one where they agree"
            )
        found = tuple(getattr(layer, "found", None) or span for layer, span in zip(cache.layers, spans, strict=True))
        facts = Facts(traced.inputs, traced.weights, Spans(spans if kind in PROMPTS else found))
        if self.ranks is not None:
            facts.add(self.ranks)
        if cache.bound is not None and (cache.bound.turns if kind in PROMPTS else cache.bound.asks):
            facts.add(RotationAsked(context_length(cache.config)))  # policies that ask share steps, not prompts
        if kind != "prefill":
            return Request(kind, cache.method), facts
        asked = cache.lookahead > 0 and cache.given_ids is None
        if asked and cache.method.writes_itself:  # our own door has read it around the model's forward
            raise LookaheadError(
                f"lookahead={cache.method.lookahead!r} through the plain door, which reads a prompt once, before there "
                "is a lookahead: use specpass.compile(model, ...), lookahead='ngram', or a draft."
            )
        if asked and not cache.method.looks_up:
            facts.add(self.draft_graphs(cache))
        goes_on = (self.speculate > 0 or cache.foresees) and DraftGraphs in facts
        return Request(kind, cache.method, cache.lookahead, self.eos_ids(cache), cache.method.verify, goes_on), facts

    def _keep_stage(self, request: Request, name: str, gm: fx.GraphModule) -> None:
        """An observer: the prefill's graph as the last pass of each wanted stage leaves it."""
        stage = next((item.stage for item in PASSES if item.name == name), "")
        if request.kind == "prefill" and stage in self.keep_stages:
            self.stages[stage] = copy_module(gm)

    def smaller_vocabulary(self, cache: BudgetCache) -> int | None:
        """Tokens that the draft knows, where the target knows more."""
        assert self.draft is not None
        known = self.draft.get_input_embeddings().num_embeddings
        return known if known < cache.config.vocab_size else None

    def eos_ids(self, cache: BudgetCache) -> tuple[int, ...]:
        """Ids that end what the draft writes."""
        if self.eos_of_text is not None:
            return self.eos_of_text
        source = self.draft.generation_config if self.draft is not None else cache.config
        return eos_ids(source)

    def draft_graphs(self, cache: BudgetCache, goes_on: bool = False, vocab: int | None = None) -> DraftGraphs:
        """The draft's graphs for this cache.

        Args:
            goes_on: also those by which it goes on behind what it has read.
            vocab: ids that the draft may write, if not those that the target knows.

        Raises: Refusal: they cannot be had.
        """
        assert self.captured is not None
        method = cache.method
        return dataclasses.replace(
            self.captured.graphs(goes_on or self.speculate > 0 or cache.foresees),
            temperature=method.temperature,
            seed=method.seed,
            target_vocab=cache.config.vocab_size if vocab is None else vocab,
            futures=method.futures,
        )

    @property
    def why_not_foreseen(self) -> str:
        """Why no draft can go on behind an answer, and what to do about it; "" where one can."""
        if not self.second_way:
            return "the plain door has nothing that asks it between two steps: use specpass.compile(model, ...)"
        return OTHER_TOKENIZER if self.eos_of_text is not None else ""

    def check_cache(self, cache: BudgetCache) -> None:
        """Raises: MethodMismatchError: the cache was made for another method. GeneratedError: it needs a draft that
        goes on, and none does.
        """
        self.report.bound = cache.bound or self.report.bound
        self.report.bits = cache.bits or self.report.bits
        if cache.bound is not None:
            cache.bound.check_foresees(self.why_not_foreseen)
        mine = dataclasses.replace(self.method, budget=cache.method.budget)
        same_budget = not isinstance(self.method.budget, int) or self.method.budget == cache.method.budget
        ours, theirs = (
            dataclasses.replace(m, lookahead_ids=None, lookahead=m.lookahead if m.lookahead in DRAFTLESS else None)  # type: ignore[call-arg]
            if m.appends
            else m
            for m in (mine, cache.method)
        )
        if ours != theirs or not same_budget:
            raise MethodMismatchError(
                f"the cache was made for {cache.method.key} and the backend for {self.method.key}: pass the same "
                "method to both."
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
