"""One case: what the compiled model answers, whether what it kept may be kept, and what the oracle answers then."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import specpass
from bench.fuzz import evictions, formulas, oracle
from bench.fuzz.cases import Case
from bench.fuzz.evictions import Event
from bench.fuzz.subject import Subject, recorded, tokenizer
from specpass.benchmarks.coverage.tiny import VOCAB

CLOSE = 1e-3  # of the logits' size
CLOSE_IN_BITS = 2e-2  # of quantised caches: what differs by rounding upstream may get another code
SCORE_CLOSE = 1e-4  # of a beam's


class WrongError(Exception):
    """The compiled model's answer, or what it kept, is not what it should be."""


@dataclasses.dataclass
class Prompts:
    """Prompts [B, S] padded on the left, and what the target read of them."""

    ids: Tensor
    mask: Tensor
    read: list[Tensor]  # of each row: prompt positions, ascending

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def row(self, index: int) -> Tensor:
        """One prompt alone [1, S_i]."""
        return self.ids[[index], self.ids.shape[1] - self.lengths[index] :]

    def as_read(self) -> Prompts:
        """The prompts that the target saw, as ones that were read whole."""
        rows = [self.row(index)[0, read] for index, read in enumerate(self.read)]
        return padded(rows)


def padded(rows: list[Tensor]) -> Prompts:
    """Prompts [S_i]; the padding is an ordinary token."""
    size = max(map(len, rows))
    ids, mask = torch.full((len(rows), size), 9), torch.zeros(len(rows), size, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, size - len(row) :], mask[index, size - len(row) :] = row, 1
    return Prompts(ids, mask, [torch.arange(len(row)) for row in rows])


def check(case: Case, subject: Subject) -> str:
    """ "" where all is well, "tie" where an answer goes another way behind equal logits.

    Raises: WrongError, and whatever the compiled model raises.
    """
    dice = torch.Generator().manual_seed(case.index)
    found = Play(case, subject, dice).run()
    if case.reset:
        found = found or Play(case, subject, dice, found_cache(subject, case)).run()
    return found


def found_cache(subject: Subject, case: Case) -> Any:
    """A cache that has read another prompt and was reset."""
    cache = subject.cache(case)
    ids = torch.randint(1, VOCAB, (len(case.lengths), 33), generator=torch.Generator().manual_seed(1))
    subject.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    return cache


class Play:
    """A case's calls, in turn, of the compiled model and of the oracle."""

    def __init__(self, case: Case, subject: Subject, dice: torch.Generator, cache: Any = None) -> None:
        self.case, self.subject, self.dice = case, subject, dice
        self.prompts = padded([self._draw(length) for length in case.lengths])
        own = bool(case.turns) or not case.early_exit or case.dropped or case.bits is not None
        own = own or case.generated is not None
        self.events: list[Event] = []
        self.checked = 0  # of them
        self.asked: Tensor | int = 0  # [B] the first tokens of the answer whose queries are there still
        self.cache = cache if cache is not None else subject.cache(case) if own else None

    def _draw(self, length: int) -> Tensor:
        return torch.randint(1, VOCAB, (length,), generator=self.dice)

    def run(self) -> str:
        with recorded() as self.events:
            return self._run()

    def _run(self) -> str:
        ids, mask = self.prompts.ids, self.prompts.mask
        view: oracle.View | None = None
        for crop, fresh in ((0, 0), *self.case.turns):
            if view is not None:
                view.limit = min(view.limit, ids.shape[1] - self.prompts.ids.shape[1] - 1 - crop)
                if crop:
                    written = mask[:, self.prompts.ids.shape[1] : -1].sum(1)
                    self.asked = (written - self._noted()).clamp(min=self.asked)
                    self.cache.crop(crop)
                    for event in self.events:
                        event.time = min(event.time, self.cache.appended)
                    ids, mask = ids[:, : -1 - crop], mask[:, : -1 - crop]
                more = padded([self._draw(max(fresh - row * self.case.ragged, 1)) for row in range(len(ids))])
                ids, mask = torch.cat([ids, more.ids], 1), torch.cat([mask, more.mask], 1)
            if self.case.dropped:
                self.events.clear()
                self.checked, self.asked = 0, 0
            before = specpass.report(self.subject.model).replayed
            ours = self._generate(self.subject.model, ids, mask)
            if view is not None and self.case.dropped:  # all of it is a prompt
                self.prompts, view = padded([row[own != 0] for row, own in zip(ids, mask, strict=True)]), None
            if view is None:
                view = self._view(ours.past_key_values)
                if self._candidates():  # several tokens come at once, and what they follow is not looked at
                    view.limit = specpass.report(self.subject.model).replayed - before
            seen = self.prompts.as_read()
            turns = 0 if self.case.dropped else ids.shape[1] - self.prompts.ids.shape[1]
            behind, shown = (own[:, own.shape[1] - turns :] for own in (ids, mask))
            view.events = [self._as_read(event) for event in self.events]
            view.mask = torch.cat([seen.mask, shown], 1)
            theirs = self._oracle(torch.cat([seen.ids, behind], 1), view)
            starts = ids.shape[1], seen.ids.shape[1] + behind.shape[1]
            if found := self._compare(ours, theirs, *starts, near=view.near):
                return found
            self._check_evictions(view)
            ids, mask = ours.sequences, F.pad(mask, (0, ours.sequences.shape[1] - mask.shape[1]), value=1)
        return ""

    # -- the two sides

    def _generate(self, model: Any, ids: Tensor, mask: Tensor) -> Any:
        torch.manual_seed(self.case.index)
        options = self._options() | self._candidates()
        if self.cache is not None:
            options["past_key_values"] = self.cache
        if self.case.stream:
            options["streamer"] = streamer = Streamer()
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
        if self.case.stream and streamer.tokens != out.sequences[0].tolist():
            raise WrongError(f"the streamer got {streamer.tokens}, the answer is {out.sequences[0].tolist()}")
        return out

    def _oracle(self, ids: Tensor, view: oracle.View) -> Any:
        torch.manual_seed(self.case.index)
        return oracle.generate(self.subject.twin, ids, view, **self._options())

    def _candidates(self) -> dict[str, Any]:
        """Where candidates come from that the model only verifies: its answer is the greedy one."""
        if self.case.mode == "assisted":
            return {"assistant_model": self.subject.assistant}
        return {"prompt_lookup_num_tokens": 2} if self.case.mode == "lookup" else {}

    def _options(self) -> dict[str, Any]:
        case = self.case
        options: dict[str, Any] = {
            "max_new_tokens": case.new,
            "do_sample": "sample" in case.mode,
            "num_beams": case.beams,
            "num_return_sequences": case.returned,
            "return_dict_in_generate": True,
            "output_logits": True,
            "output_scores": True,
        }
        if "sample" in case.mode:
            options |= {"temperature": 4.0, "top_k": 20}
        if case.eos:
            options["eos_token_id"] = list(range(case.index % 7, VOCAB, 7))
        if case.stop:
            options |= {"stop_strings": list("AFKPUZejoty"), "tokenizer": tokenizer()}
        return options

    # -- what was kept

    def _view(self, cache: Any) -> oracle.View:
        """What rows behind the prompt see of it; the cache's rows of one prompt are neighbours, and alike."""
        subject, count = self.subject, len(self.prompts.ids)
        repeats = len(next(layer.lengths for layer in cache.layers if hasattr(layer, "lengths"))) // count
        ahead = None if cache.lookahead_ids is None else cache.lookahead_ids[::repeats]
        if cache.prompt_positions is not None:
            rows = cache.prompt_positions[::repeats]
            self.prompts.read = [row[row >= 0] for row in rows]
            self._check_read(ahead)
        seen = self.prompts.as_read()
        first = {event.layer: event.first for event in reversed(self.events)}
        kept = {
            layer: self._numbered(first.get(layer, cache.layers[layer].positions)[::repeats]) for layer in subject.full
        }
        for row in range(count):
            self._check_kept(seen, row, kept, ahead)
        view = oracle.View(seen.ids.shape[1] - seen.mask.sum(1), seen.ids.shape[1], kept)
        view.bits = 0 if subject.refusals else self.case.bits or 0
        if subject.verifies(self.case) and ahead is not None:
            view.ahead, view.limit = ahead, ahead.shape[1]
        return view

    def _numbered(self, positions: Tensor) -> Tensor:
        """[B, K, C], numbered by the prompt, as numbers among the tokens that were read of it."""
        repeats = len(positions) // len(self.prompts.read)
        reads = [read for read in self.prompts.read for _ in range(repeats)]
        return torch.stack(
            [
                torch.where(own < 0, -1, torch.searchsorted(read, own.clamp(min=0).contiguous()))
                for read, own in zip(reads, positions, strict=True)
            ]
        )

    def _as_read(self, event: Event) -> Event:
        return dataclasses.replace(event, first=self._numbered(event.first), positions=self._numbered(event.positions))

    def _window(self) -> int:
        """The newest tokens, which no eviction takes."""
        return evictions.newest(self.case.generated or 0)

    def _noted(self) -> int:
        """The newest tokens whose queries say what goes."""
        return evictions.noted(self.case.evict, self.case.generated or 0)

    def _check_evictions(self, view: oracle.View) -> None:
        """What went scores least; the oracle has read all of the answer by now."""
        before: dict[int, Event] = {}
        for index, event in enumerate(view.events):
            if index >= self.checked:
                self._check_eviction(view, event, before.get(event.layer))
            before[event.layer] = event
        self.checked = len(view.events)

    def _check_eviction(self, view: oracle.View, event: Event, last: Event | None) -> None:
        case, window, (queries, keys) = self.case, self._window(), view.states[event.layer]
        noted, omega = self._noted(), self.subject.omega(event.layer)
        starts, answers = view.columns(*keys.shape[::2])
        followed = torch.zeros(len(keys), dtype=torch.int64) if view.followed is None else view.followed
        for row, answer in enumerate(answers):
            written = [column for column in answer if column < view.prompt + event.time]
            begin = max(int(followed[row]), int(torch.as_tensor(self.asked).expand(len(keys))[row]))
            told = written[max(begin, len(written) - noted) :]  # the others' queries were never computed
            apart = followed.min() < followed.max() and len(written) - noted < int(followed.max())
            for head in range(keys.shape[1]):
                slots, left = [], event.held(row, head, starts[row], answer)
                if case.shared:
                    own = event.first[row, head]
                    slots = (own[own >= 0] + starts[row]).tolist()
                elif not torch.equal(event.first, event.positions):
                    raise WrongError(f"row {row}, layer {event.layer}: an eviction changes what is kept of the prompt")
                behind = set(written)
                if last is not None:
                    old = [column for column in answer if column < view.prompt + last.time]
                    behind -= set(old) - set(last.held(row, head, starts[row], answer)[1])
                slots += sorted(behind)
                asked = queries.unflatten(1, (keys.shape[1], -1))[row, head][:, told]
                asked = F.pad(asked, (0, 0, noted - len(told), 0))
                worth = None if apart else evictions.scores(case.evict, keys[row, head, slots], asked, window, omega)
                stay = [*(left[0] if case.shared else []), *left[1]]
                found = evictions.why_not_least(case.evict, slots, stay, event.most, window, worth)
                if found:
                    raise WrongError(f"row {row}, layer {event.layer}, head {head}, {event.time} on: {found}")

    def _check_ahead(self, row: int, ahead: Tensor) -> None:
        """The lookahead [L] is what the draft writes, or what the prompt itself goes on with."""
        if self.subject.method.looks_up:
            wanted = formulas.looked_up(self.prompts.row(row)[0].tolist(), len(ahead))
            if ahead.tolist() != wanted:
                raise WrongError(f"row {row}: looks up {ahead.tolist()}, due are {wanted}")
            return
        ids = torch.cat([self.prompts.row(row), ahead[None]], 1)
        view = oracle.View(torch.zeros(1, dtype=torch.int64), ids.shape[1])
        with oracle.seen_by(view), torch.no_grad():
            logits = self.subject.draft(input_ids=ids, use_cache=False).logits[0, -len(ahead) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, ahead[:, None])[:, 0]
        if float(behind.max()) > CLOSE * float(logits.abs().max()):
            raise WrongError(f"row {row}: the draft does not write {ahead.tolist()}")

    def _check_read(self, ahead: Tensor | None) -> None:
        """SpecPC: the tokens read are those that the draft's attention chooses."""
        method, subject = self.subject.resolved(self.case), self.subject
        names = ("budget", "window", "kernel", "neighbours", "first_layer")  # SpecKV-PC has some of its own beside them
        how = {name: getattr(method, f"prompt_{name}", getattr(method, name)) for name in names}
        for row, read in enumerate(self.prompts.read):
            ids = self.prompts.row(row)
            if how["budget"] >= ids.shape[1] or subject.refusals:
                if len(read) != ids.shape[1]:
                    raise WrongError(f"row {row}: {len(read)} of {ids.shape[1]} tokens read")
                continue
            if ahead is None or ahead.shape[1] != method.lookahead:
                raise WrongError(f"row {row}: the draft writes {ahead}, due are {method.lookahead} tokens")
            self._check_ahead(row, ahead[row])
            tokens = torch.cat([ids, ahead[[row], :-1]], 1)  # nothing follows the last token: it has no row
            weights = oracle.probabilities(subject.draft, tokens, how["window"] + method.lookahead - 1)
            scores = formulas.token_scores([weights[layer] for layer in sorted(weights)], ids.shape[1], how)
            wanted = formulas.read_tokens(scores, how["budget"], how)
            if read.tolist() != wanted:
                raise WrongError(f"row {row}: reads {read.tolist()}, due are {wanted}")

    def _check_kept(self, seen: Prompts, row: int, kept: dict[int, Tensor], ahead: Tensor | None) -> None:
        """Every layer keeps a top choice of the scores that the formulas give."""
        method, length = self.subject.resolved(self.case), seen.lengths[row]
        ids, budget = seen.row(row), method.budget if not self.subject.refusals else length
        counts = [
            self._budget(budget, length, depth, [own[row] for own in kept.values()]) for depth in range(len(kept))
        ]
        if budget < length and ahead is not None and method.appends:
            self._check_ahead(row, ahead[row])
            ids = torch.cat([ids, ahead[[row]]], 1)
        weights: dict[int, Tensor] = {}
        if method.scored and min(counts, default=length) < length:
            weights = oracle.probabilities(self.subject.twin, ids, method.window + ids.shape[1] - length)
        how = {name: getattr(method, name) for name in ("window", "reduce", "pool", "kernel")}
        for (layer, positions), count in zip(kept.items(), counts, strict=True):
            own = positions[row]
            if method.scored:
                scores = formulas.head_scores(weights[layer], len(own), length, how) if weights else own
                found = formulas.why_not_top(own, scores, length, count, method.window)
            else:
                wanted = formulas.streamed(length, budget if method.prompt is None else length)
                found = "" if all(torch.equal(head[head >= 0], wanted) for head in own) else f"keeps {own.tolist()}"
            if found:
                raise WrongError(f"row {row}, layer {layer}: {found}")

    def _budget(self, mean: int, length: int, depth: int, kept: list[Tensor]) -> int:
        """Slots that a layer has; how PyramidKV's are rounded is left open: what was kept may be on either side."""
        if not hasattr(self.subject.method, "beta") or mean >= length:
            return mean
        ideal, count = formulas.falling(mean, self.subject.method, depth, len(kept)), int((kept[depth][0] >= 0).sum())
        return count if abs(count - min(ideal, length)) < 1 else round(ideal)

    # -- the two answers

    def _compare(self, ours: Any, theirs: Any, our_start: int, their_start: int, near: bool) -> str:
        """Args: near: rounding may have decided what a quantised number became."""
        a, b = ours.sequences[:, our_start:], theirs.sequences[:, their_start:]
        if self.case.beams > 1:
            if a.shape == b.shape and torch.equal(a, b):
                return ""
            apart = (ours.sequences_scores - theirs.sequences_scores).abs().max()
            if apart <= SCORE_CLOSE:
                return "tie"
            raise WrongError(
                f"beams score {ours.sequences_scores.tolist()}, due are {theirs.sequences_scores.tolist()}"
            )
        for row in range(len(b)):
            for step, (mine, due) in enumerate(zip(ours.logits, theirs.logits, strict=False)):
                apart, scale = float((mine[row] - due[row]).abs().max()), max(1.0, float(due[row].abs().max()))
                if not apart <= (CLOSE if self.case.bits is None else CLOSE_IN_BITS) * scale:
                    if near:
                        return "tie"
                    raise WrongError(f"row {row}, token {step}: logits differ by {apart:.2g} of {scale:.2g}")
                if a[row, step] != b[row, step]:
                    return "tie"
        if a.shape != b.shape:
            raise WrongError(f"{a.shape[1]} tokens, due are {b.shape[1]}")
        return ""


class Streamer:
    """Notes the tokens that a streamer gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Nothing is held back."""
