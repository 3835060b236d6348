"""What a call kept of its prompts: whether that may be kept, and what rows behind them see then."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.fuzz import formulas, oracle
from bench.fuzz.cases import Case
from bench.fuzz.evictions import Event
from bench.fuzz.prompts import Prompts, WrongError
from bench.fuzz.subject import Subject

CLOSE = 1e-3  # of the logits' size
CLOSE_IN_BITS = 2e-2  # of quantised caches: what differs by rounding upstream may get another code

SCORING = ("window", "reduce", "pool", "kernel", "value_norms", "reconstruction")  # of a method


class Head(NamedTuple):
    """Of a KV head its layer, its slots C in the mean, what it keeps, and scores and what rounding may do to them."""

    layer: int
    slots: int
    kept: Tensor
    scores: Tensor
    near: Tensor


def sharing(heads: list[Head], spread: str) -> list[list[Head]]:
    """Heads that share their budgets; no group where there is no head."""
    if spread == "global" and heads:
        return [heads]
    by_layer = [list(own) for _, own in itertools.groupby(heads, lambda head: head.layer)]
    return by_layer if spread == "heads" else [[head] for head in heads]


def apart(ours: Tensor, due: Tensor, case: Case) -> str:
    """What is wrong with logits [V]; "" where they are as close as the case lets them be."""
    between, scale = float((ours - due).abs().max()), max(1.0, float(due.abs().max()))
    if between <= (CLOSE if case.bits is None else CLOSE_IN_BITS) * scale:
        return ""
    return f"logits differ by {between:.2g} of {scale:.2g}"


@dataclasses.dataclass
class Kept:
    """What a cache holds of prompts, by the oracle's formulas."""

    case: Case
    subject: Subject
    prompts: Prompts

    def view(self, cache: Any, events: list[Event]) -> oracle.View:
        """What rows behind the prompts see of them; the cache's rows of one prompt are neighbours, and alike.

        Args: events: evictions since the prompts were read.

        Raises: WrongError: something else may have been kept.
        """
        subject, count = self.subject, len(self.prompts.ids)
        repeats = len(next(layer.lengths for layer in cache.layers if hasattr(layer, "lengths"))) // count
        ahead = None if cache.lookahead_ids is None else cache.lookahead_ids[::repeats]
        if cache.prompt_positions is not None:
            rows = cache.prompt_positions[::repeats]
            self.prompts.read = [row[row >= 0] for row in rows]
            self._check_read(ahead)
        seen = self.prompts.as_read()
        first = {event.layer: event.first for event in reversed(events)}
        kept = {
            layer: self.numbered(first.get(layer, cache.layers[layer].positions)[::repeats]) for layer in subject.full
        }
        for row in range(count):
            self._check_kept(seen, row, kept, ahead)
        view = oracle.View(seen.size - seen.mask.sum(1), seen.size, kept)
        view.bits = 0 if subject.refusals else self.case.bits or 0
        if subject.verifies(self.case) and ahead is not None:
            view.ahead, view.limit = ahead, ahead.shape[1]
        return view

    def numbered(self, positions: Tensor) -> Tensor:
        """[B, K, C], numbered by the prompt, as numbers among the tokens that were read of it."""
        repeats = len(positions) // len(self.prompts.read)
        reads = [read for read in self.prompts.read for _ in range(repeats)]
        return torch.stack(
            [
                torch.where(own < 0, -1, torch.searchsorted(read, own.clamp(min=0).contiguous()))
                for read, own in zip(reads, positions, strict=True)
            ]
        )

    def as_read(self, event: Event) -> Event:
        return dataclasses.replace(event, first=self.numbered(event.first), positions=self.numbered(event.positions))

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
            scores = formulas.token_scores([weights[layer][0] for layer in sorted(weights)], ids.shape[1], how)
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
        if not method.scored:
            wanted = formulas.streamed(length, budget if method.prompt is None else length)
            for layer, positions in kept.items():
                if not all(torch.equal(head[head >= 0], wanted) for head in positions[row]):
                    raise WrongError(f"row {row}, layer {layer}: keeps {positions[row].tolist()}")
            return
        found: dict[int, tuple[Tensor, Tensor]] = {}
        if min(counts, default=length) < length:
            found = oracle.probabilities(self.subject.twin, ids, method.window + ids.shape[1] - length)
        how = {name: getattr(method, name) for name in SCORING}
        heads: list[Head] = []
        for (layer, positions), count in zip(kept.items(), counts, strict=True):
            none = torch.zeros(len(positions[row]), 0)
            scores, near = formulas.head_scores(*found[layer], length, how) if found else (none, none)
            heads += [Head(layer, count, *own) for own in zip(positions[row], scores, near, strict=True)]
        for own in sharing(heads, method.spread):
            scored = [(head.scores, head.near) for head in own]
            why = formulas.why_not_top([head.kept for head in own], scored, length, own[0].slots, method.window)
            if why:
                raise WrongError(f"row {row}, layer {own[0].layer}, of {len(own)} heads: {why}")

    def _budget(self, mean: int, length: int, depth: int, kept: list[Tensor]) -> int:
        """Slots that a layer has; how PyramidKV's are rounded is left open: what was kept may be on either side."""
        if not hasattr(self.subject.method, "beta") or mean >= length:
            return mean
        ideal, count = formulas.falling(mean, self.subject.method, depth, len(kept)), int((kept[depth][0] >= 0).sum())
        return count if abs(count - min(ideal, length)) < 1 else round(ideal)
