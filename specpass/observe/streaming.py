"""Streamers for `generate`: one hands over text as it comes and keeps tokens, text and times, one keeps times alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
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
