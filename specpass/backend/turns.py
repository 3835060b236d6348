"""Turns of a conversation whose keys and values are all held (`dropped="host"`): each chooses anew among all of them.

A prompt, and every turn behind it, is read as a question behind a document is (behind.py): against the keys and values
of all tokens so far, which lie in host memory and come a layer at a time. The answer's own were computed from a pruned
cache; the turn reads its tokens again, so that what it sees, keeps and holds is what a prompt of the whole conversation
would.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend.behind import LEAST, Behind, graphs_that_go_on, pairs_of, why_nothing_is_held
from specpass.backend.itself import Itself
from specpass.cache.budget import BudgetCache
from specpass.cache.conversation import CONVERSATIONS, HOST, Conversation, Held
from specpass.cache.identity import Identity
from specpass.cache.prefix import Prefix
from specpass.cache.prompt import check_gradients, positions_of
from specpass.capture.devices import device_of
from specpass.errors import DroppedError, MaskError, UnsupportedCallError
from specpass.interpret.beside import features
from specpass.interpret.draft import write_by_graphs
from specpass.interpret.question import Front, Rows
from specpass.methods.base import Method
from specpass.parallel.agree import about_ids, agreement
from specpass.passes.draft import DraftGraphs
from specpass.reports.record import HeldRecord
from specpass.rewrite import Refusal


def check_holds(target: nn.Module, method: Method, by_text: bool) -> None:
    """Args: by_text: whether the draft has another tokenizer.

    Raises: DroppedError: the target, the method or the draft cannot go on from what is held.
    """
    reason = why_nothing_is_held(target, method, by_text)
    if method.share is not None and not reason:
        reason = f"share={method.share} chooses among sizes for the first prompt, and a conversation outgrows them"
    if reason:
        raise _refused(reason)


def _refused(reason: object) -> DroppedError:
    return DroppedError(
        f"dropped='host' is not to be had: {reason}. Use another method or model, or leave dropped out."
    )


@dataclasses.dataclass
class Turns:
    """Prompts, turns and answers of one compiled target, with caches that hold what they drop."""

    behind: Behind
    itself: Itself

    def __call__(self, cache: BudgetCache, kwargs: dict[str, Any], given: Any, prefix: Any) -> Any | None:
        """The model's output for a prompt, or for several tokens behind one; one token of an answer is noted: None.

        Args: given: lookahead_ids of the call. prefix: the document that a prompt stands behind, or None.

        Raises: SpecpassError: see the checks. What is found before anything is read leaves the cache as it was.
        """
        ids = check_tokens(kwargs)
        if cache.filled and ids.shape[1] == 1:
            CONVERSATIONS[cache].tell(ids, cache.appended)
            return None
        talk = self._begun(cache, ids, prefix)
        before = dict(cache.__dict__)
        try:
            rows, columns, mask = self._rows(cache, talk, kwargs, ids)
            cache.look_ahead(given)
            drafts = self.behind.check(cache, rows)
        except BaseException:
            cache.__dict__.update(before)
            raise
        cache.reset()  # the conversation is put back once it is read
        try:
            out = self._read(cache, talk, kwargs, rows, drafts)
        except Refusal as refusal:
            cache.reset()
            raise _refused(refusal) from refusal
        except BaseException:
            cache.reset()
            raise
        talk.ids, talk.mask, talk.answer = columns, mask, columns[:, :0]
        self._told(cache, talk, rows)
        return out

    def _begun(self, cache: BudgetCache, ids: Tensor, prefix: Any) -> Conversation:
        """The cache's conversation, or one of which nothing was read, or that stands behind a document.

        Raises: DroppedError, PrefixModelError, PrefixDtypeError, PrefixDraftError, ...
        """
        target, backend = self.behind.target, self.behind.backend
        check_gradients(target.parameters())
        check_holds(target, cache.method, by_text=backend.eos_of_text is not None)
        backend.check_cache(cache)
        backend.report.saw(cache.config)
        who = Identity.of(target)
        drafter = Identity.of(backend.draft) if backend.draft is not None and cache.method.needs_draft else None
        if cache.filled:
            CONVERSATIONS[cache].check_reader(who, drafter)
            return CONVERSATIONS[cache]
        talk = Conversation.of(ids)
        talk.reader, talk.drafter = who, drafter
        if prefix is not None:
            with agreement(backend.ranks, "generate") as told:
                self._stand_behind(talk, prefix, len(ids))
                told["the prefix"] = about_ids(prefix.ids)
        return talk

    @staticmethod
    def _stand_behind(talk: Conversation, prefix: Any, count: int) -> None:
        """Let what is held begin with a document, in each of `count` rows."""
        if not isinstance(prefix, Prefix):
            raise UnsupportedCallError(
                f"prefix={type(prefix).__name__}: expected what specpass.read(model, document_ids) or "
                "specpass.Prefix.load(path) returned."
            )
        assert talk.reader is not None
        prefix.check_target(talk.reader)
        pairs = [(talk.target, prefix.layers)]
        if prefix.draft is not None and talk.drafter is not None:
            prefix.check_draft(talk.drafter)
            pairs.append((talk.draft, dict(enumerate(prefix.draft))))
        talk.ids = prefix.ids.to(talk.ids.device).expand(count, -1)
        talk.mask = torch.ones_like(talk.ids)
        talk.behind, talk.hidden = prefix.key, len(prefix)
        for held, layers in pairs:
            for layer, (key, value) in layers.items():
                held.write(layer, key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1), 0)
            held.lengths = torch.full((count,), len(prefix))

    def _rows(
        self, cache: BudgetCache, talk: Conversation, kwargs: dict[str, Any], ids: Tensor
    ) -> tuple[Rows, Tensor, Tensor]:
        """All of the conversation, packed, and its columns [B, T] and their mask with those of the call.

        Raises: DroppedError, MaskError, UnsupportedCallError.
        """
        if cache.uneven:
            raise DroppedError(
                "some tokens of the answer were masked, and dropped='host' reads all of them again: pass no mask with "
                "an answer's tokens, or leave dropped out."
            )
        columns, mask = talk.so_far(cache.appended)
        if len(columns) != len(ids):
            raise UnsupportedCallError(f"{len(ids)} rows come behind a conversation of {len(columns)}: pass as many.")
        columns = torch.cat([columns, ids], 1)
        mask = torch.cat([mask, own_mask(kwargs, ids)], 1)
        check_positions(kwargs.get("position_ids"), mask, talk.hidden)
        return Rows.packed(columns, mask, ids.shape[1]), columns, mask

    def _read(self, cache: BudgetCache, talk: Conversation, kwargs: dict[str, Any], rows: Rows, drafts: bool) -> Any:
        """The model's output for the call's columns; all that was read is held.

        Raises: Refusal.
        """
        behind, method = self.behind, cache.method
        talk.settle()
        lengths = rows.lengths.to(HOST)
        write = functools.partial(self._written, cache, talk.draft, rows, lengths) if drafts else None
        ahead = behind.ahead(cache, rows, write)
        first, held = talk.target.first, talk.target
        scored = method.scored and not behind.fits(cache, rows)
        count = min(rows.size, max(rows.own, held.unread(lengths), method.window if scored else 1))

        def hold(layer: int, key: Tensor, value: Tensor) -> None:
            held.write(layer, key[:, :, first:], value[:, :, first:], first)

        out = self.itself.read(cache, kwargs, rows, Front(held.pairs(), hold, DroppedError), count, ahead)
        held.lengths = lengths
        return out

    def _written(self, cache: BudgetCache, held: Held, rows: Rows, lengths: Tensor) -> Tensor:
        """[B, L]: what the draft writes behind all of the conversation, of which it reads what it has not read.

        Raises: Refusal: it cannot go on from what it has read.
        """
        behind, count, shortest = self.behind, cache.lookahead, int(lengths.min())
        rows = behind.for_draft(rows)
        graphs = graphs_that_go_on(behind.backend, cache)
        if shortest < LEAST and graphs.futures > 1:
            raise Refusal(f"futures={graphs.futures}, and a row of one token")
        if shortest < LEAST:  # rows that are too short for the graph by which it goes on: what it reads is not held
            return write_by_graphs(graphs, rows.ids, rows.lengths, count).ids
        unread, first = max(LEAST, held.unread(lengths)), held.first
        if not first or shortest < unread:
            caches, unread, first = self._prefilled(graphs, rows, count), LEAST, 0
        else:
            caches = behind.copies(cache, rows, list(held.pairs().values()), unread)
        ahead = behind.write(cache, graphs, rows, caches, unread)
        for layer, (key, value) in enumerate(pairs_of(graphs, caches, slice(first, rows.size))):
            held.write(layer, key, value, first)
        held.lengths = lengths
        return ahead

    @staticmethod
    def _prefilled(graphs: DraftGraphs, rows: Rows, room: int) -> list[Tensor]:
        """The draft's caches of all rows, which end in front of the last tokens: these are read again."""
        _, *caches = graphs.prefill(rows.ids, rows.lengths, room, *graphs.params.values())
        caches = list(caches[: 3 * graphs.layers])
        for index in range(2, len(caches), 3):
            caches[index] = (rows.lengths - LEAST)[:, None].repeat(1, caches[index].shape[1])
        return caches

    def _told(self, cache: BudgetCache, talk: Conversation, rows: Rows) -> None:
        """What the cache knows of a conversation, in the caller's count, and what the report says of it."""
        CONVERSATIONS[cache] = talk
        device, columns = rows.ids.device, talk.ids.shape[1] - talk.hidden
        cache.seen = torch.full((), columns, dtype=torch.int64, device=device)
        cache.padded = not bool(talk.mask.all())
        if talk.hidden:
            cache.behind = talk.behind
            cache.shift = torch.full((len(talk.ids),), -talk.hidden, dtype=torch.int64, device=device)
        draft = self.behind.backend.draft
        places = {device, *(layer.lengths.device for layer in cache.budgeted)}
        places |= set() if draft is None else {device_of(draft)}
        for place in places:  # what the host holds may be moved there
            if place.type == "cuda":
                torch.cuda.current_stream(place).synchronize()
        report = self.behind.backend.report
        report.held = HeldRecord(len(talk.ids), rows.size, talk.target.nbytes, talk.draft.nbytes)
        report.note("prompts and turns with dropped='host': the model's own forward reads them, not a graph")


def check_tokens(kwargs: dict[str, Any]) -> Tensor:
    """[B, q] ids.

    Raises: UnsupportedCallError: something else comes, or something beside them.
    """
    ids, seen = kwargs.get("input_ids"), features(kwargs)
    if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None or seen:
        raise UnsupportedCallError(
            f"{seen[0] if seen else 'inputs_embeds'} with dropped='host': what is held is of token ids; pass "
            "input_ids, or leave dropped out."
        )
    if not isinstance(kwargs.get("logits_to_keep", 0), int):
        raise UnsupportedCallError("logits_to_keep with dropped='host': expected a number of rows.")
    return ids


def own_mask(kwargs: dict[str, Any], ids: Tensor) -> Tensor:
    """[B, q] int64: of a mask [B, M] of all tokens so far the call's own columns.

    Raises: MaskError.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if mask.dim() != 2 or len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        raise MaskError(
            f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids.shape)}: pass a mask [B, M] of all tokens "
            "so far, these included, or none."
        )
    own = mask[:, mask.shape[1] - ids.shape[1] :].to(torch.int64)
    if not bool(own[:, -1].all()):
        raise MaskError(
            "attention_mask ends with 0 in some row, so that row has no last token: pad on the left "
            "(tokenizer.padding_side = 'left')."
        )
    return own


def check_positions(given: Any, mask: Tensor, hidden: int) -> None:
    """Position ids [.., B or 1, q] are those that the columns so far [B, T] count, but for `hidden` in front.

    Raises: UnsupportedCallError.
    """
    if given is None:
        return
    count = given.shape[-1]
    counted, own = (positions_of(mask) - hidden)[:, -count:], mask[:, -count:]
    if not bool(((given == counted) | (own == 0)).all()):
        raise UnsupportedCallError(
            "position_ids with dropped='host' count the conversation's tokens from 0: leave them out, or pass such."
        )
