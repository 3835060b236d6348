"""A compiled model, its uncompiled twin with the oracle's attention, and their draft."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

import specpass
from bench.fuzz import oracle
from bench.fuzz.cases import METHODS, OWN_DRAFT, RECURRENT, SPREAD, Case
from bench.fuzz.evictions import Event
from specpass.benchmarks.coverage.tiny import VOCAB, tiny_model
from specpass.cache import budget


class Subject:
    """What cases of one family, method and budget call."""

    def __init__(self, family: str, method: str, budget: float) -> None:
        name, fields = (METHODS | SPREAD)[method]
        fields = {**fields, "prompt_budget": max(fields["prompt_budget"], budget)} if method == "speckv-pc" else fields
        self.method: Any = getattr(specpass, name)(budget=budget, **fields)
        self.model, self.twin = tiny_model(family), plain(family)
        drafting = (family, 0) if method in OWN_DRAFT and family not in RECURRENT else ("llama", 1)
        self.draft = plain(*drafting) if self.method.needs_draft else None
        draft = tiny_model(*drafting) if self.method.needs_draft else None
        specpass.compile(self.model, draft=draft, method=self.method, lowering="eager")
        self.assistant = tiny_model("llama", 1)
        self.full = [layer for layer, window in oracle.windows(self.twin).items() if window is None]

    def cache(self, case: Case) -> Any:
        method, longest = self.resolved(case), max(case.lengths)
        return specpass.BudgetCache(
            self.model.config,
            method,
            max_new_tokens=case.new,
            prompt_length=longest,
            early_exit=case.early_exit,
            dropped="host" if case.dropped else None,
            cache_bits=case.bits,
            generated=case.generated,
            evict=case.evict,
            share_budget=case.shared,
        )

    def resolved(self, case: Case) -> Any:
        """The method with the budget that a ratio is of the case's padded prompts."""
        return self.method.resolve(max(case.lengths))

    def verifies(self, case: Case) -> bool:
        """Whether an answer goes by the prefill's logits while it is the lookahead."""
        report = specpass.report(self.model)
        if not self.method.verify or report.interpreted:
            return False
        if case.dropped or (case.prefix is not None and not self._as_one(case, case.prefix[1])):
            return True  # read by the model's own forward
        return not [note for graph in report.graphs for note in graph.notes if note.startswith("no verified lookahead")]

    def _as_one(self, case: Case, document: int) -> bool:
        """Whether some row is so short that its document and question are read as one prompt, by a graph."""
        return min(case.lengths) < max(max(case.lengths) - document, self.method.window)

    def omega(self, layer: int) -> Any:
        """[F] by which a layer's first F dimensions turn with the F behind them, as in all families here that turn."""
        kinds = getattr(self.twin.config, "layer_types", None)
        names = ("inv_freq", *([f"{kinds[layer]}_inv_freq"] if kinds else []))
        held = (getattr(module, name, None) for module in self.twin.modules() for name in names)
        return next((own for own in held if own is not None), torch.zeros(0))

    @property
    def refusals(self) -> list[str]:
        return specpass.report(self.model).refusals


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """Evictions from here on, in order."""
    events: list[Event] = []
    before = budget.evict

    def evict(layer: Any, bound: Any, kept: int, seed: int) -> None:
        first = layer.positions.clone()
        before(layer, bound, kept, seed)
        if layer.ordinals is not None:  # not of windows
            most = kept + (layer.slots - bound.room) * bound.shared
            numbers = layer.generated.clone()
            events.append(Event(layer.index, layer.cache.appended, first, layer.positions.clone(), numbers, most))

    budget.evict = evict
    try:
        yield events
    finally:
        budget.evict = before


def plain(family: str, seed: int = 0) -> Any:
    """A model whose attention is the oracle's."""
    model = tiny_model(family, seed)
    model.config._attn_implementation = oracle.NAME
    for module in model.modules():
        if hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), torch.Tensor):
            module.register_forward_hook(oracle.watch_experts)
    return model


@functools.cache
def tokenizer() -> Any:
    """One character a token: for stop strings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({chr(token): token for token in range(VOCAB)}, unk_token=chr(0)))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=chr(0), pad_token=chr(0))
