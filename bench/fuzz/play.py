"""One case: what the compiled model answers, whether what it kept may be kept, and what the oracle answers then."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import specpass
from bench.fuzz import oracle
from bench.fuzz.cases import Case
from bench.fuzz.kept import Kept, apart
from bench.fuzz.prompts import WrongError, padded
from bench.fuzz.subject import Subject, recorded, tokenizer
from bench.fuzz.went import Went
from specpass.benchmarks.coverage.tiny import VOCAB

SCORE_CLOSE = 1e-4  # of a beam's


class Play:
    """A case's calls, in turn, of the compiled model and of the oracle.

    Args: prefix: what was read of the prompts beforehand, which the compiled model's calls do not bring. The oracle
        knows nothing of it.
    """

    def __init__(
        self,
        case: Case,
        subject: Subject,
        dice: torch.Generator,
        prefix: specpass.Prefix | None = None,
        cache: Any = None,
    ) -> None:
        self.case, self.subject, self.dice, self.prefix = case, subject, dice, prefix
        document = torch.empty(0, dtype=torch.int64) if prefix is None else prefix.ids
        self.hidden = len(document)
        rows = [torch.cat([document, self._draw(length - self.hidden)]) for length in case.lengths]
        self.kept = Kept(case, subject, padded(rows))
        self.size = self.kept.prompts.size  # of the first prompts
        own = bool(case.turns) or not case.early_exit or case.dropped or case.bits is not None
        own = own or case.generated is not None or case.resampled is not None
        self.went = Went(case, subject)
        self.cache = cache if cache is not None else subject.cache(case) if own else None

    def _draw(self, length: int) -> Tensor:
        return torch.randint(1, VOCAB, (length,), generator=self.dice)

    def run(self) -> str:
        with recorded() as self.went.events:
            return self._run()

    def _run(self) -> str:
        ids, mask = self.kept.prompts.ids, self.kept.prompts.mask
        view: oracle.View | None = None
        for crop, fresh in ((0, 0), *self.case.turns):
            if view is not None:
                if crop:  # else what a turn feeds, the answer's last token first, may be the lookahead's too
                    view.limit = min(view.limit, ids.shape[1] - self.kept.prompts.size - 1 - crop)
                ids, mask = self._following(ids, mask, crop, fresh)
            if self.case.dropped:
                self.went.forget()
            before = specpass.report(self.subject.model).replayed
            told, shown = self._told(ids, mask)
            ours = self._generate(told, shown, first=view is None)
            if view is not None and self.case.dropped:  # all of it is a prompt
                rows = [row[own != 0] for row, own in zip(ids, mask, strict=True)]
                self.kept, view = Kept(self.case, self.subject, padded(rows)), None
            if view is None:
                view = self.kept.view(ours.past_key_values, self.went.events)
                if self._candidates():  # several tokens come at once, and what they follow is not looked at
                    view.limit = specpass.report(self.subject.model).replayed - before
            seen = self.kept.prompts.as_read()
            turns = 0 if self.case.dropped else ids.shape[1] - self.kept.prompts.size
            behind, since = (own[:, own.shape[1] - turns :] for own in (ids, mask))
            view.events = [self.kept.as_read(event) for event in self.went.events]
            view.mask = torch.cat([seen.mask, since], 1)
            theirs = self._oracle(torch.cat([seen.ids, behind], 1), view)
            starts = told.shape[1], seen.size + behind.shape[1]
            if found := self._compare(ours, theirs, *starts, near=view.near):
                return found
            self.went.check(view)
            if self.case.turns:
                answer = ours.sequences[:, told.shape[1] :]
                ids, mask = torch.cat([ids, answer], 1), F.pad(mask, (0, answer.shape[1]), value=1)
        return ""

    def _following(self, ids: Tensor, mask: Tensor, crop: int, fresh: int) -> tuple[Tensor, Tensor]:
        """The conversation so far [B, T] without what the cache crops, and with so many tokens more."""
        if crop:
            written = mask[:, self.kept.prompts.size : -1].sum(1)
            self.cache.crop(crop)
            self.went.cropped(written, self.cache.appended)
            ids, mask = ids[:, : -1 - crop], mask[:, : -1 - crop]
        more = padded([self._draw(max(fresh - row * self.case.ragged, 1)) for row in range(len(ids))])
        return torch.cat([ids, more.ids], 1), torch.cat([mask, more.mask], 1)

    def _told(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a call brings of tokens [B, T] and their mask: not the document, so that padding begins behind it."""
        return ids[:, self.hidden :], torch.cat([mask[:, : self.size - self.hidden], mask[:, self.size :]], 1)

    def _generate(self, ids: Tensor, mask: Tensor, first: bool) -> Any:
        torch.manual_seed(self.case.index)
        options = self._options() | self._candidates()
        if self.cache is not None:
            options["past_key_values"] = self.cache
        if self.prefix is not None and (first or self.case.index % 2):  # a turn may bring it along, or not
            options["prefix"] = self.prefix
        if self.case.stream:
            options["streamer"] = streamer = Streamer()
        out = self.subject.model.generate(input_ids=ids, attention_mask=mask, **options)
        if self.case.stream and streamer.tokens != out.sequences[0].tolist():
            raise WrongError(f"the streamer got {streamer.tokens}, the answer is {out.sequences[0].tolist()}")
        if not torch.equal(out.sequences[:: self.case.returned, : ids.shape[1]], ids):
            raise WrongError("what is returned does not begin with the tokens of the call")
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

    def _compare(self, ours: Any, theirs: Any, our_start: int, their_start: int, near: bool) -> str:
        """Args: near: see View.near."""
        a, b = ours.sequences[:, our_start:], theirs.sequences[:, their_start:]
        if self.case.beams > 1:
            if a.shape == b.shape and torch.equal(a, b):
                return ""
            between = (ours.sequences_scores - theirs.sequences_scores).abs().max()
            if between <= SCORE_CLOSE:
                return "tie"
            raise WrongError(
                f"beams score {ours.sequences_scores.tolist()}, due are {theirs.sequences_scores.tolist()}"
            )
        for row in range(len(b)):
            for step, (mine, due) in enumerate(zip(ours.logits, theirs.logits, strict=False)):
                if found := apart(mine[row], due[row], self.case):
                    if near:
                        return "tie"
                    raise WrongError(f"row {row}, token {step}: {found}")
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
