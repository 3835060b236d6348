"""A document that is read once (specpass.read), and the questions that models answer behind it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend import checks
from specpass.backend.behind import LEAST, Behind, graphs_that_go_on, pairs_of, why_nothing_is_held
from specpass.backend.compile import Backend
from specpass.backend.itself import Itself
from specpass.cache.budget import BudgetCache
from specpass.cache.identity import Identity
from specpass.cache.prefix import Pair, Prefix
from specpass.cache.prompt import check_gradients, check_ids, check_prompt, positions_of
from specpass.capture.devices import device_of
from specpass.dialect.define import SPEC
from specpass.errors import PrefixCacheError, PrefixUnsupportedError, PromptError, UnsupportedCallError
from specpass.interpret.beside import features
from specpass.interpret.document import placed, read_document
from specpass.interpret.question import Front, Rows, part
from specpass.methods.base import Method
from specpass.observe import progress
from specpass.parallel.agree import about_ids, agreement
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
            time. None: where the model computes, layer by layer.

    Raises:
        PromptError: no tokens. PrefixUnsupportedError: a model or a method that cannot go on from a prefix, and why.
        UnsupportedCallError: the model is not compiled with specpass. DraftContextError: longer than the draft reads.
        RanksDisagreeError: of a target that is spread over processes: they read different documents.
    """
    target: Any = base_of(model)
    state = target.__dict__.get("_specpass")
    if state is None:
        raise UnsupportedCallError(
            "specpass.read needs a model that is compiled: specpass.compile(model, draft=..., method=...) first."
        )
    backend: Backend = state.backend
    checks.check_decoder(target, "target")
    target = target if state.part is None else state.part
    with agreement(backend.ranks, "specpass.read") as told:
        checks.check_draft(backend.draft, backend.method)
        check_supported(target, backend.method, by_text=backend.eos_of_text is not None)
        ids = document_of(document_ids)
        told["the document"] = about_ids(ids)
    own = ids[None].to(device_of(target))
    place = None if device is None else torch.device(device)
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
    reason = why_nothing_is_held(target, method, by_text)
    if reason:
        raise PrefixUnsupportedError(f"no prefix here: {reason}. Use another method or model, or {WHOLE}.")


def _read_by_draft(backend: Backend, cache: BudgetCache, ids: Tensor, device: torch.device | None) -> list[Pair] | None:
    """The draft's keys and values of ids [1, P], where it is to look ahead.

    Raises: PrefixUnsupportedError: it has no graphs. DraftContextError.
    """
    if backend.draft is None or not cache.method.needs_draft:
        return None
    check_prompt(cache, (1, ids.shape[1]), None, cache.lookahead, context_length(backend.draft.config))
    check_ids(ids, backend.smaller_vocabulary(cache))
    graphs = _graphs(backend, cache)
    ids = ids.to(device_of(backend.draft))
    lengths = SPEC.full_lengths(ids)
    with progress.task("the draft reads the document"):
        _, *rest = graphs.prefill(ids, lengths, 1, *graphs.params.values())
    pairs = pairs_of(graphs, rest, slice(ids.shape[1]))
    return [(placed(key, device), placed(value, device)) for key, value in pairs]


def _graphs(backend: Backend, cache: BudgetCache) -> DraftGraphs:
    """Raises: PrefixUnsupportedError: the draft has none."""
    try:
        return graphs_that_go_on(backend, cache)
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

    behind: Behind
    itself: Itself
    whole: Callable[..., Any]

    def __call__(self, cache: BudgetCache, kwargs: dict[str, Any], prefix: Prefix) -> Any:
        """The model's output for question rows in `kwargs`, which are pruned into the empty cache.

        Raises: SpecpassError: see the checks.
        """
        target, backend = self.behind.target, self.behind.backend
        check_gradients(target.parameters())
        with agreement(backend.ranks, "generate") as told:
            check_question(kwargs, prefix)
            check_supported(target, cache.method, by_text=backend.eos_of_text is not None)
            backend.check_cache(cache)
            prefix.check_target(Identity.of(target))
            told["the prefix"] = about_ids(prefix.ids)
        backend.report.saw(cache.config)
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
        behind, method = self.behind, cache.method
        short, drafts = behind.fits(cache, rows), behind.check(cache, rows)
        if drafts:
            assert behind.backend.draft is not None, "checked when the model was compiled"
            prefix.check_draft(Identity.of(behind.backend.draft))
        count = max(rows.own, 1 if short or not method.scored else method.window, LEAST if drafts else 1)
        if int(rows.lengths.min()) < count:  # a document that is hardly there
            return self._as_one(kwargs, rows)
        ahead = behind.ahead(cache, rows, functools.partial(self._written, cache, prefix, rows) if drafts else None)
        try:
            out = self.itself.read(cache, kwargs, rows, Front(prefix.layers), count, ahead)
        except Refusal as refusal:
            raise PrefixUnsupportedError(f"no prefix here: {refusal}. Use another model, or {WHOLE}.") from refusal
        note = "questions behind a prefix: the model's own forward reads them, not a graph of the prompt"
        behind.backend.report.note(note)
        return out

    def _written(self, cache: BudgetCache, prefix: Prefix, rows: Rows) -> Tensor:
        """What the draft writes, which goes on from a copy of its own keys and values."""
        assert prefix.draft is not None, "a draft has read it"
        rows = self.behind.for_draft(rows)
        graphs, unread = _graphs(self.behind.backend, cache), max(LEAST, rows.own)
        caches = self.behind.copies(cache, rows, prefix.draft, unread)
        return self.behind.write(cache, graphs, rows, caches, unread)

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
