"""A document that is read once (specpass.read), and the questions that models answer behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend import checks
from specpass.backend.calls import mark_slots
from specpass.backend.compile import Backend
from specpass.backend.facts import quantized_axes
from specpass.backend.speculate import lower_proposals
from specpass.backend.uncompiled import Uncompiled, attention_of
from specpass.cache.budget import BudgetCache
from specpass.cache.drafting import start_draft
from specpass.cache.identity import Identity
from specpass.cache.prefix import Pair, Prefix
from specpass.cache.prompt import check_gradients, check_ids, check_prompt, positions_of
from specpass.cache.replay import REPLAYS, Replay
from specpass.cache.states import recurrent_layer, tell_widest, why_unheld
from specpass.capture.rope import following
from specpass.dialect.define import SPEC
from specpass.errors import PrefixCacheError, PrefixUnsupportedError, PromptError, UnsupportedCallError
from specpass.interpret.beside import features
from specpass.interpret.document import placed, read_document
from specpass.interpret.question import Question, Rows, part
from specpass.methods.base import Method
from specpass.observe import progress
from specpass.passes.draft import DraftGraphs
from specpass.reports.report import base_of
from specpass.rewrite import Refusal
from specpass.sizes import context_length

WHOLE = "pass document and question as one prompt"


def read(model: nn.Module, document_ids: Any, *, device: str | torch.device | None = None) -> Prefix:
    """Read a document once, for any number of questions: `model.generate(question_ids, prefix=prefix)`.

    A question then costs what its own tokens and the lookahead's cost, scores all of document and question, and is
    answered from a fresh cache, as if both had come as one prompt: the same positions are kept. `generate` returns and
    counts the question's tokens and the answer's.

    Args:
        model: from `specpass.compile`. Its target reads the document, and its draft, if the method has one.
        document_ids: token ids, a tensor or a list [P] or [1, P]; what a tokenizer puts in front of texts stands there.
        device: where the keys and values are to lie: "cpu" is host memory, from which a question takes one layer at a
            time. None: where the model computes.

    Raises:
        PromptError: no tokens. PrefixUnsupportedError: a model or a method that cannot go on from a prefix, and why.
        UnsupportedCallError: the model is not compiled with specpass. DraftContextError: longer than the draft reads.
    """
    target: Any = base_of(model)
    state = target.__dict__.get("_specpass")
    if state is None:
        raise UnsupportedCallError(
            "specpass.read needs a model that is compiled: specpass.compile(model, draft=..., method=...) first."
        )
    backend: Backend = state.backend
    checks.check_decoder(target, "target")
    checks.check_draft(backend.draft, backend.method)
    check_supported(target, backend.method, by_text=backend.eos_of_text is not None)
    ids = document_of(document_ids)
    computes = checks.device_of(target)
    own = ids[None].to(computes)
    place = computes if device is None else torch.device(device)
    with torch.no_grad():
        cache = BudgetCache(target.config, backend.method, prompt_length=len(ids))
        draft = _read_by_draft(backend, cache, own, place)
        layers = read_document(target, cache, own, place)
    drafter = None if draft is None or backend.draft is None else Identity.of(backend.draft)
    return Prefix(ids, layers, draft, Identity.of(target), drafter)


def document_of(given: Any) -> Tensor:
    """[P] int64 on the host.

    Raises: PromptError: no token, or several documents.
    """
    ids = torch.as_tensor(given)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
        what = "no token" if not ids.numel() else f"{ids.dtype} {tuple(ids.shape)}"
        raise PromptError(f"document_ids hold {what}: pass the token ids of one document, [P] or [1, P].")
    return ids.to("cpu", torch.int64, copy=True)


def check_supported(target: nn.Module, method: Method, by_text: bool) -> None:
    """Args: by_text: whether the draft has another tokenizer.

    Raises: PrefixUnsupportedError: the target, the method or the draft cannot go on from a prefix.
    """
    config: Any = target.config
    state = recurrent_layer(config)
    follows = following(target)
    spread, futures, sparse = method.spread, method.futures, method.sparse_prefill
    reasons = (
        (method.prompt is not None, f"{method.name} chooses the tokens that the target reads by each question"),
        (spread != "uniform", f"spread={spread!r} shares budgets in a prompt's graph"),
        (method.share is not None, f"share={method.share} chooses a budget in a prompt's graph"),
        (by_text, "the draft has another tokenizer, and the prefix's tokens are the target's"),
        (futures > 1, f"futures={futures} are read in a prompt's graph"),
        (sparse > 0, f"sparse_prefill={sparse} reads a prompt sparsely, and its keys and values would be others"),
        (bool(why_unheld(config)), why_unheld(config)),
        (bool(state), f"{state}, whose state cannot be taken back to where a question's rows begin"),
        (bool(follows), f"its rotary frequencies follow the length (rope_type {'/'.join(follows)})"),
        (attention_of(target).startswith("flex"), f"its attention is {attention_of(target)}"),
    )
    for found, reason in reasons:
        if found:
            raise PrefixUnsupportedError(f"no prefix here: {reason}. Use another method or model, or {WHOLE}.")


def _read_by_draft(backend: Backend, cache: BudgetCache, ids: Tensor, device: torch.device) -> list[Pair] | None:
    """The draft's keys and values of ids [1, P], where it is to look ahead.

    Raises: PrefixUnsupportedError: it has no graphs. DraftContextError.
    """
    if backend.draft is None or not cache.method.needs_draft:
        return None
    check_prompt(cache, (1, ids.shape[1]), None, cache.lookahead, context_length(backend.draft.config))
    check_ids(ids, backend.smaller_vocabulary(cache))
    graphs = _graphs(backend, cache)
    lengths = SPEC.full_lengths(ids)
    with progress.task("the draft reads the document"):
        _, *rest = graphs.prefill(ids, lengths, 1, *graphs.params.values())
    found: list[Pair] = []
    for index in range(0, 3 * graphs.layers, 3):
        key, value = (states.unflatten(1, (rest[index + 2].shape[1], -1)) for states in rest[index : index + 2])
        found.append((placed(key[:, :, : ids.shape[1]], device), placed(value[:, :, : ids.shape[1]], device)))
    return found


def _graphs(backend: Backend, cache: BudgetCache) -> DraftGraphs:
    """Raises: PrefixUnsupportedError: the draft has none."""
    assert backend.draft is not None
    follows = following(backend.draft)
    try:
        if follows:
            raise Refusal(f"its rotary frequencies follow the length (rope_type {'/'.join(follows)})")
        return backend.draft_graphs(cache, goes_on=True)
    except Refusal as refusal:
        raise PrefixUnsupportedError(
            f"no prefix here: the draft cannot go on from one ({refusal}). Use another draft, SnapKV, or {WHOLE}."
        ) from refusal


def check_same(cache: BudgetCache, prefix: Any) -> None:
    """Tokens that follow a prompt may bring its prefix along (generate does).

    Raises: PrefixCacheError: the cache's prompt stands behind another one, or behind none.
    """
    if prefix is not None and (not isinstance(prefix, Prefix) or prefix.key != cache.behind):
        what = "a prompt behind another prefix" if cache.behind else "a prompt without a prefix"
        raise PrefixCacheError(
            f"prefix= and a cache that holds {what}: leave past_key_values out, so that the question gets a fresh "
            "cache, or leave prefix out to go on from the cache."
        )


@dataclasses.dataclass
class Questions:
    """Questions of one compiled target.

    Args: whole: the compiled call, for what is no longer than the rows that a question needs.
    """

    target: nn.Module
    backend: Backend
    uncompiled: Uncompiled
    whole: Callable[..., Any]
    runs: dict[int, tuple[DraftGraphs, Callable[..., Any]]] = dataclasses.field(default_factory=dict)  # by L

    def __call__(self, cache: BudgetCache, kwargs: dict[str, Any], prefix: Prefix) -> Any:
        """The model's output for question rows in `kwargs`, which are pruned into the empty cache.

        Raises: SpecpassError: see the checks.
        """
        check_gradients(self.target.parameters())
        check_question(kwargs, prefix)
        check_supported(self.target, cache.method, by_text=self.backend.eos_of_text is not None)
        self.backend.check_cache(cache)
        prefix.check_target(Identity.of(self.target))
        self.backend.report.saw(cache.config)
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        rows = Rows.of(prefix.ids, ids, mask if isinstance(mask, Tensor) else None)
        try:
            out = self._read(cache, kwargs, prefix, rows)
        except BaseException:
            cache.reset()
            raise
        cache.seen = torch.full((), rows.own, dtype=torch.int64, device=ids.device)
        cache.shift = torch.full((ids.shape[0],), -len(prefix), dtype=torch.int64, device=ids.device)
        cache.padded, cache.behind = not rows.even, prefix.key
        return out

    def _read(self, cache: BudgetCache, kwargs: dict[str, Any], prefix: Prefix, rows: Rows) -> Any:
        backend, method = self.backend, cache.method
        short = cache.early_exit and rows.size <= cache.whole
        drafts = not short and cache.lookahead > 0 and cache.given_ids is None and not method.looks_up
        context = context_length(backend.draft.config) if drafts and backend.draft is not None else None
        check_prompt(cache, (len(rows.ids), rows.size), None, 0 if short else cache.lookahead, context)
        if drafts:
            assert backend.draft is not None, "checked when the model was compiled"
            prefix.check_draft(Identity.of(backend.draft))
            check_ids(rows.ids, backend.smaller_vocabulary(cache))
        count = max(rows.own, 1 if short or not method.scored else method.window, 2 if drafts else 1)
        if int(rows.lengths.min()) < count:  # a document that is hardly there
            return self._as_one(kwargs, rows)
        ahead = None if short or not cache.lookahead else self._ahead(cache, prefix, rows, drafts)
        graphs = not self.uncompiled.reason
        verify = graphs and ahead is not None and method.verify and not kwargs.get("output_hidden_states")
        question = Question(self.target, cache, kwargs, eos_ids=backend.eos_ids(cache), layers=prefix.layers, rows=rows)
        out, logits, record, exact = question.read(count, ahead, short, verify)
        if graphs and exact:
            layer, reason = min(exact.items())
            raise PrefixUnsupportedError(
                f"no prefix here: layer {layer} cannot be pruned around the model's own forward, which reads questions "
                f"({reason}). Use another model, or {WHOLE}."
            )
        cache.lookahead_ids = ahead
        backend.report.read(record)
        backend.report.note("questions behind a prefix: the model's own forward reads them, not a graph of the prompt")
        if graphs:
            self._go_on_by_graphs(cache)
        if verify:
            REPLAYS[cache] = Replay(logits, backend.eos_ids(cache))
        return out

    def _as_one(self, kwargs: dict[str, Any], rows: Rows) -> Any:
        """Document and question as one prompt, read by whatever reads prompts."""
        whole = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "position_ids")}
        mask = rows.mask()
        whole |= {"input_ids": rows.last(rows.size), "attention_mask": mask, "position_ids": positions_of(mask)}
        cache = kwargs["past_key_values"]
        out = self.whole(**whole, lookahead_ids=cache.given_ids)
        if cache.exact:
            raise PrefixUnsupportedError(
                f"no prefix here: the model runs exactly (specpass.report says why). Use another model, or {WHOLE}."
            )
        out.logits = part(out.logits, rows.own, 0)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(part(states, rows.own, 0) for states in out.hidden_states)
        return out

    def _ahead(self, cache: BudgetCache, prefix: Prefix, rows: Rows, drafts: bool) -> Tensor:
        """[B, L] lookahead tokens: the caller's, the prompt's own, or the draft's."""
        if cache.given_ids is not None:
            return cache.given_ids.to(rows.ids.device, copy=True)
        if not drafts:
            return SPEC.prompt_lookup(rows.ids, rows.lengths, cache.lookahead)
        return self._written(cache, prefix, rows)

    def _written(self, cache: BudgetCache, prefix: Prefix, rows: Rows) -> Tensor:
        """What the draft writes, which goes on from a copy of its own keys and values."""
        assert prefix.draft is not None, "a draft has read it"
        backend, length, unread = self.backend, cache.lookahead, max(2, rows.own)
        graphs = _graphs(backend, cache)
        device, batch, slots = rows.ids.device, len(rows.ids), rows.size + length
        caches: list[Tensor] = []
        for pair in prefix.draft:
            for states in pair:
                own = torch.zeros(batch, states.shape[1], slots, states.shape[3], dtype=states.dtype, device=device)
                own[:, :, : len(prefix)] = states.to(device, non_blocking=True)
                caches.append(own.flatten(1, 2))
            caches.append((rows.lengths - unread)[:, None].repeat(1, pair[0].shape[1]))
        inputs = (rows.last(unread), rows.positions(unread), *caches, *graphs.params.values())
        known = self.runs.get(length)
        if known is None or known[0].extend is not graphs.extend:
            run = lower_proposals(backend, graphs, length, inputs, lookahead=True)
            known = self.runs[length] = (graphs, run)
        with progress.task("the draft looks ahead"):
            ahead = known[1](*inputs)
        if backend.speculate and not self.uncompiled.reason:
            start_draft(cache, caches, rows.ids, length)
        return ahead

    def _go_on_by_graphs(self, cache: BudgetCache) -> None:
        """Let the cache be what a prompt's graph leaves: steps are told slots, and constants of storage as such."""
        cache.columns, cache.read_mask = None, None
        tell_widest(cache.budgeted)
        storages: list[Tensor] = []
        alike = len({layer.quantized[0].shape for layer in cache.budgeted if layer.quantized}) <= 1
        for layer in cache.budgeted:
            for tensor, axes in zip(layer.quantized or (), quantized_axes(alike), strict=False):
                torch._dynamo.mark_static(tensor, axes)
            for tensor, axis in ((layer.key_buffer, 2), (layer.value_buffer, 2), (layer.lengths, 1)):
                torch._dynamo.mark_static(tensor, axis)
                storages += [tensor] if axis == 2 else []
        if len({layer.slots for layer in cache.budgeted}) == 1:
            mark_slots(storages, self.backend.sizes)


def check_question(kwargs: dict[str, Any], prefix: Any) -> None:
    """Raises: UnsupportedCallError: what comes behind a prefix is no question of token ids."""
    if not isinstance(prefix, Prefix):
        raise UnsupportedCallError(
            f"prefix={type(prefix).__name__}: expected what specpass.read(model, document_ids) or "
            "specpass.Prefix.load(path) returned."
        )
    ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    seen = features(kwargs)
    if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None or seen:
        what = seen[0] if seen else "inputs_embeds"
        raise UnsupportedCallError(f"{what} behind a prefix: questions are token ids; pass input_ids, or {WHOLE}.")
    if mask is not None and (mask.dim() != 2 or mask.shape != ids.shape or not bool(mask[:, -1].all())):
        raise UnsupportedCallError(
            f"attention_mask is {tuple(mask.shape)} and the question {tuple(ids.shape)}: behind a prefix it is that of "
            "the question alone, padded on the left."
        )
    if positions is not None:
        counted = positions_of(torch.ones_like(ids) if mask is None else mask)
        if not bool(((positions == counted) | (counted == 0)).all()):
            raise UnsupportedCallError(
                "position_ids behind a prefix count from the question's first token, 0: leave them out, or pass such."
            )
    if not isinstance(kwargs.get("logits_to_keep", 0), int):
        raise UnsupportedCallError("logits_to_keep behind a prefix: expected a number of rows.")
