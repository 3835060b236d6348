"""What was evicted of a bounded answer (generated=): whether it may have gone."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fuzz import evictions, oracle
from bench.fuzz.cases import Case
from bench.fuzz.evictions import Event
from bench.fuzz.prompts import WrongError
from bench.fuzz.subject import Subject


@dataclasses.dataclass
class Went:
    """Evictions of one conversation since its prompts were read.

    Args:
        events: in order. checked: of them.
        asked: [B] the first tokens of the answer whose queries are there still.
    """

    case: Case
    subject: Subject
    events: list[Event] = dataclasses.field(default_factory=list)
    checked: int = 0
    asked: Tensor | int = 0

    @property
    def slots(self) -> int:
        return self.case.generated or 0

    @property
    def noted(self) -> int:
        """The newest tokens whose queries say what goes."""
        return evictions.noted(self.case.evict, self.slots)

    def forget(self) -> None:
        """All of the conversation is a prompt."""
        self.events.clear()
        self.checked, self.asked = 0, 0

    def cropped(self, written: Tensor, left: int) -> None:
        """Args: written: [B] tokens behind the prompts before a crop. left: columns behind them after it."""
        self.asked = (written - self.noted).clamp(min=self.asked)
        for event in self.events:
            event.time = min(event.time, left)

    def check(self, view: oracle.View) -> None:
        """What went scores least; the oracle has read all of the answer by now."""
        before: dict[int, Event] = {}
        for index, event in enumerate(view.events):
            if index >= self.checked:
                self._check_eviction(view, event, before.get(event.layer))
            before[event.layer] = event
        self.checked = len(view.events)

    def _check_eviction(self, view: oracle.View, event: Event, last: Event | None) -> None:
        case, window, (queries, keys) = self.case, evictions.newest(self.slots), view.states[event.layer]
        noted, omega = self.noted, self.subject.omega(event.layer)
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
