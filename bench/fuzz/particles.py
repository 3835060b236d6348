"""Particles: sequences that go on from prompts that were read once, chosen anew every few steps, by direct calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fuzz import oracle
from bench.fuzz.kept import apart
from bench.fuzz.play import Play
from bench.fuzz.prompts import WrongError


class Particles(Play):
    """A case's prompts, and `case.resampled`: sequences of each, and steps until they are chosen anew.

    Some of a sequence's tokens are the likeliest, and so may be the lookahead's; the others are any.
    """

    @torch.no_grad()
    def _run(self) -> str:
        assert self.case.resampled is not None
        each, often = self.case.resampled
        prompts, dice = self.kept.prompts, self.dice
        told, shown = self._told(prompts.ids, prompts.mask)
        logits = self._call(told, shown, {} if self.prefix is None else {"prefix": self.prefix})
        view, seen = self.kept.view(self.cache, []), prompts.as_read()
        self.cache.batch_repeat_interleave(each)
        own = torch.arange(len(told)).repeat_interleave(each)  # the prompt of each sequence
        logits, written = logits[own], torch.empty(len(own), 0, dtype=torch.int64)
        for step in range(self.case.new + 1):
            if step:
                likely = torch.rand(len(own), generator=dice) < 0.5
                token = torch.where(likely, logits.argmax(-1), self._draw(len(own)))[:, None]
                written = torch.cat([written, token], 1)
                logits = self._call(token, F.pad(shown[own], (0, written.shape[1]), value=1))
            view.mask = F.pad(seen.mask[own], (0, written.shape[1]), value=1)
            due, near = self._due(of_rows(view, own), torch.cat([seen.ids[own], written], 1))
            for row in range(len(own)):
                if found := apart(logits[row], due[row], self.case):
                    if near:
                        return "tie"
                    raise WrongError(f"sequence {row}, token {step}: {found}")
            if step % often == often - 1:
                parents = self._parents(own)
                self.cache.reorder_cache(parents)
                own, written, logits = own[parents], written[parents], logits[parents]
        return ""

    def _call(self, ids: Tensor, mask: Tensor, given: dict[str, Any] | None = None) -> Tensor:
        """[rows, V] of the last of ids [rows, q]; mask: of all tokens so far."""
        told = {"attention_mask": mask, "past_key_values": self.cache, "logits_to_keep": 1}
        return self.subject.model(input_ids=ids, **told, **(given or {})).logits[:, -1]

    def _due(self, view: oracle.View, ids: Tensor) -> tuple[Tensor, bool]:
        """The oracle's logits [rows, V] behind ids [rows, T], and whether rounding may have decided a code."""
        assert view.mask is not None
        view.follow(ids)
        places = (view.mask.cumsum(1) - 1).clamp(min=0)
        with oracle.seen_by(view):
            out = self.subject.twin(input_ids=ids, attention_mask=view.mask, position_ids=places, use_cache=False)
        return out.logits[:, -1], view.near

    def _parents(self, own: Tensor) -> Tensor:
        """[rows] from which sequences go on: of the same prompt, or, at times, of any."""
        dice, count = self.dice, len(own)
        if int(torch.randint(3, (), generator=dice)) == 0:
            return torch.randint(count, (count,), generator=dice)
        alike = (own[:, None] == own[None]).float()
        return alike.multinomial(1, generator=dice)[:, 0]


def of_rows(view: oracle.View, own: Tensor) -> oracle.View:
    """What rows [rows] see, each of which stands behind prompt own[row]; `view.mask` is theirs."""
    kept = {layer: positions[own] for layer, positions in view.kept.items()}
    ahead = None if view.ahead is None else view.ahead[own]
    return dataclasses.replace(view, starts=view.starts[own], kept=kept, ahead=ahead)
