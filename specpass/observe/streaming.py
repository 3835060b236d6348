"""Streamers for `generate`: one hands over text as it comes and keeps tokens, text and times, one keeps times alone."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer


class Streamer(TextStreamer):
    """Text of one sequence without its prompt and without special tokens.

    Args:
        tokenizer: decodes the ids.
        write: called as write(text, nl=False) with each finished piece of text; None only collects.

    Attributes:
        ids: new token ids so far. times: `time.perf_counter()` at each. text: what was decoded so far.
    """

    def __init__(self, tokenizer: Any, write: Callable[..., Any] | None = None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.write is not None:
            self.write(text, nl=stream_end)


@dataclasses.dataclass
class Written:
    """One of several answers: its token ids, and its text once all of them have ended."""

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""


class Several(BaseStreamer):
    """Several answers of one prompt, a token of each at a time.

    Args:
        tokenizer: decodes the ids. ends: of these ids one ends an answer; what follows it is padding.
        count: of the answers. write: called as write(text, nl=True) with each of them, numbered, when all have ended.

    Attributes:
        own: of each answer what was written. times: `time.perf_counter()` at each token.
    """

    def __init__(
        self, tokenizer: Any, ends: Iterable[int], count: int, write: Callable[..., Any] | None = None
    ) -> None:
        self.tokenizer, self.ends, self.write = tokenizer, frozenset(ends), write
        self.own = [Written() for _ in range(count)]
        self.times: list[float] = []
        self.begun = self.over = False

    @property
    def ids(self) -> list[int]:
        """Those of the first answer, and `text` likewise."""
        return self.own[0].ids

    @property
    def text(self) -> str:
        return self.own[0].text

    def put(self, value: Tensor) -> None:
        if not self.begun:  # the prompt comes first
            self.begun = True
            return
        self.times.append(time.perf_counter())
        for own, token in zip(self.own, value.flatten().tolist(), strict=True):
            if not own.ids or own.ids[-1] not in self.ends:
                own.ids.append(token)

    def end(self) -> None:
        if self.over:
            return
        self.over = True
        for number, own in enumerate(self.own, 1):
            own.text = self.tokenizer.decode(own.ids, skip_special_tokens=True)
            if self.write is not None:
                self.write(f"[{number}] {own.text}", nl=True)


class Clock(BaseStreamer):
    """Notes `time.perf_counter()` when each token is there; the first call brings the prompt.

    Attributes: times: of the prompt and of each token. steps: seconds of each decode step.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.cpu()  # waits for the device
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """`generate` asks for it."""

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times[1:])]
