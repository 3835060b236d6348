"""When the second way is taken (specpass.interpret), and why: by what a model is, or for want of a whole graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._pytree import tree_map

from specpass.backend.compile import Backend
from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import check_ids
from specpass.cache.states import recurrent_layer, why_unheld
from specpass.capture.devices import device_of, spread_over
from specpass.capture.model import untraceable
from specpass.capture.rope import following
from specpass.errors import (
    BudgetError,
    CacheStateError,
    FuturesError,
    NoAttentionSiteError,
    PartialGraphError,
    SpecpassError,
    SpreadError,
    UncompiledCacheError,
    UnsplicedGraphError,
)
from specpass.interpret.beside import axes_disagree, beside, features, types_mask
from specpass.interpret.draft import Written, write_by_forward, write_by_graphs
from specpass.interpret.rows import Packing
from specpass.interpret.run import Call
from specpass.interpret.spread import Unspread
from specpass.parallel.agree import first_ranks
from specpass.passes.attend_slots import UNSPREAD
from specpass.rewrite import Refusal
from specpass.rewrite.verify import StageError
from specpass.sizes import context_length

# What a call may fail of while its graph is made. Mistakes of the user's are other errors, and stay errors.
FAILURES = (TorchDynamoException, PartialGraphError, UncompiledCacheError, NoAttentionSiteError, UnsplicedGraphError)


def why_uncompiled(target: nn.Module) -> str:
    """What makes a whole graph impossible, known before the first call; "" where one is tried."""
    if why_unheld(target.config):
        return ""
    found = recurrent_layer(target.config)
    if found:
        return f"{found}: its state has no form in a graph"
    attention = attention_of(target)
    if attention.startswith("flex"):
        return f"attention is {attention}, which no pass recognises"
    if "dynamic" in following(target):
        return "its rotary frequencies follow the length (rope_type 'dynamic'), which every call looks at anew"
    return untraceable(target)


def why_uncaptured(target: nn.Module, cache: BudgetCache, kwargs: dict[str, Any]) -> str:
    """What a call brings that its graph could not take; "" where one is tried."""
    seen = features(kwargs)
    if seen or cache.filled:
        return ", ".join(seen)
    if types_mask(target, kwargs):
        return "token_type_ids, which its masks are made of,"
    if axes_disagree(kwargs.get("position_ids")):
        return "position ids that differ by axis"
    embeds = kwargs.get("inputs_embeds")
    if embeds is None or not cache.lookahead or (cache.early_exit and embeds.shape[1] <= cache.whole):
        return ""
    return "inputs_embeds and a lookahead, which is embedded as the model does it,"


def attention_of(target: nn.Module) -> str:
    """The model's attention function, by name."""
    return target.config.get_text_config(decoder=True)._attn_implementation or ""


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    cause = getattr(error, "inner_exception", None) or error
    if isinstance(cause, InvalidCxxCompiler):
        return "no C++ compiler was found: install one, name it in CXX, or take the eager lowering"
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:200]}" if lines else type(cause).__name__


class Uncompiled:
    """Calls of one target the second way. `reason` is "" while graphs serve."""

    def __init__(self, backend: Backend, reason: str) -> None:
        self.backend = backend
        backend.second_way = True
        backend.report.interpreted = reason

    @property
    def reason(self) -> str:
        return self.backend.report.interpreted

    def failed(self, error: BaseException, cache: BudgetCache) -> None:
        """A graph could not be made: from now on the second way; a prompt starts anew.

        Raises: the error: a pass breaks its word, which is no model's fault.
        """
        if isinstance(getattr(error, "inner_exception", None), StageError):
            raise error
        whole = isinstance(error, UnsplicedGraphError)
        self.backend.report.interpreted = str(error) if whole else f"no whole graph could be made ({first_line(error)})"
        if isinstance(error, TorchDynamoException):  # it may be a fault of specpass
            reason = self.backend.report.interpreted
            warnings.warn(f"specpass: {reason}; the model's own forward runs instead.", stacklevel=3)
        if not isinstance(cache.seen, Tensor):  # no prompt was read to its end
            cache.reset()

    def check(self, cache: BudgetCache) -> None:
        """Raises: GeneratedError: evictions ask what a graph alone says, or a draft that goes on where graphs do."""
        if cache.bound is not None:
            reason = self.reason or "by what the call brings"
            cache.bound.check_turns(
                cache.config.model_type, {}, f"its own forward runs, and no graph says it: {reason}"
            )
            cache.bound.check_foresees(
                f"here the model's own forward runs, behind which none does ({reason}): use another model"
            )

    def __call__(self, target: nn.Module, cache: BudgetCache, kwargs: dict[str, Any]) -> Any:
        backend = self.backend
        backend.check_cache(cache)
        if cache.method.spread != "uniform" and (spread_over(target) or UNSPREAD in self.reason):
            raise self.unspread(cache, self.reason)
        if cache.method.futures > 1:
            raise FuturesError(
                f"{cache.method.name}(futures={cache.method.futures}): several futures are read where a graph reads "
                f"the prompt, and here the model's own forward does ({self.reason or 'by what the call brings'}): "
                "leave futures out."
            )
        self.check(cache)
        if cache.rungs:
            raise BudgetError(
                f"budget={backend.method.budget!r}, share={cache.method.share}: a budget is chosen where a graph reads "
                f"the prompt, and here the model's own forward does ({self.reason or 'by what the call brings'}): give "
                "a number of KV slots alone, e.g. budget=1024."
            )
        backend.report.saw(cache.config)
        context = None if backend.draft is None else context_length(backend.draft.config)
        attention = attention_of(target)
        call = Call(target, cache, kwargs, Writer(backend, target, cache), backend.eos_ids(cache), context)
        started = cache.filled
        if not started and attention.startswith("flex"):  # compiled by itself, where a watch would be in its way
            backend.report.refuse(f"attention is {attention}: load the model with attn_implementation='sdpa'")
            return call.whole()
        try:
            out, record = call()
        except (SpecpassError, torch.OutOfMemoryError):
            raise
        except Unspread as error:
            raise self.unspread(cache, str(error)) from error
        except Exception as error:
            if started:
                raise CacheStateError(
                    f"the prompt was pruned, and no token can follow it ({first_line(error)}): call "
                    "specpass.restore(model)."
                ) from error
            backend.report.refuse(str(error) if isinstance(error, Refusal) else first_line(error))
            return call.whole()  # what is the model's own mistake comes again
        if record is not None:
            backend.report.read(record)
            if record.two_phases and backend.method.verify:
                backend.report.note("no verified lookahead: without graphs nothing of the lookahead is kept")
            if backend.speculate:
                backend.report.note("speculation needs graphs: every token is decoded by itself")
        return out

    @staticmethod
    def unspread(cache: BudgetCache, reason: str) -> SpreadError:
        method = cache.method
        return SpreadError(
            f"{method.name}(spread={method.spread!r}): KV heads cannot share budgets here ({reason}): use "
            "spread='uniform'."
        )


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a call whose tensors lie on `device`."""
    return tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, given)


class Writer:
    """The draft's tokens: by its captured graphs, by its own forward where there are none."""

    def __init__(self, backend: Backend, target: nn.Module, cache: BudgetCache) -> None:
        self.backend, self.target, self.cache = backend, target, cache

    def __call__(
        self, ids: Tensor, mask: Tensor | None, packing: Packing, lookahead: int, call: Mapping[str, Any]
    ) -> Written:
        """On the prompt's device, wherever the draft computes.

        Raises: Refusal: the draft's attention is needed, and it cannot be captured.
        """
        draft, ranks = self.backend.draft, self.backend.ranks
        assert draft is not None
        at = device_of(draft)
        theirs = None if mask is None else mask.to(at)
        written = self._written(ids.to(at), theirs, packing.on(at), lookahead, call)
        scores = None if written.scores is None else first_ranks(written.scores.to(ids.device), ranks)
        return Written(first_ranks(written.ids.to(ids.device), ranks), scores)

    def _written(
        self, ids: Tensor, mask: Tensor | None, packing: Packing, lookahead: int, call: Mapping[str, Any]
    ) -> Written:
        backend, cache = self.backend, self.cache
        check_ids(ids, backend.smaller_vocabulary(cache))
        assert backend.draft is not None
        seen, theirs = features(call), moved(beside(call, backend.draft, self.target), ids.device)
        if theirs:
            backend.report.note(f"the draft's own forward writes, token by token: it reads {', '.join(seen)} too")
            return self._by_forward(ids, mask, lookahead, theirs)
        if seen:
            backend.report.note(f"the draft takes no {', '.join(seen)}: it reads their placeholders as plain tokens")
        try:
            graphs = backend.draft_graphs(cache)
        except Refusal as refusal:
            if cache.compresses:
                raise
            backend.report.note(f"the draft's own forward writes, token by token: {refusal}")
            return self._by_forward(ids, mask, lookahead, {})
        return write_by_graphs(graphs, packing.ids(ids), packing.lengths, lookahead)

    def _by_forward(self, ids: Tensor, mask: Tensor | None, lookahead: int, beside: dict[str, Any]) -> Written:
        draft, how, vocab = self.backend.draft, self.cache.method, self.cache.config.vocab_size
        assert draft is not None
        return write_by_forward(draft, ids, mask, lookahead, vocab, how.temperature, how.seed, beside)
