"""What takes long, told as it goes on: who works opens a task and says how far it is, who watches shows it.

    with watching(watch):
        model.generate(**inputs)

Nobody watches unless asked to; a task, or a layer that is done, then costs one look at a context variable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol


class Watch(Protocol):
    """Who is told. Tasks nest: what is told belongs to the one that was opened last."""

    def begin(self, what: str, total: float | None) -> None:
        """A task of `total` parts, None where nobody knows how many."""

    def advance(self, parts: float) -> None:
        """So many more parts are done, of no task where none is open."""

    def end(self) -> None:
        """The task is over, done or not."""


READING = "reading the prompt"

_WATCH: ContextVar[Watch | None] = ContextVar("specpass_watch", default=None)
_INNERMOST: ContextVar[str] = ContextVar("specpass_task", default="")


@contextlib.contextmanager
def watching(watch: Watch | None) -> Iterator[None]:
    """What this thread does inside is told to `watch`, or to nobody."""
    before = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(before)


def watched() -> bool:
    return _WATCH.get() is not None


def leave() -> None:
    """Nobody is told of what else happens inside `watching`: an answer is being written where bars would stand."""
    _WATCH.set(None)


@contextlib.contextmanager
def task(what: str, total: float | None = None) -> Iterator[None]:
    watch = _WATCH.get()
    if watch is None:
        yield
        return
    watch.begin(what, total)
    around = _INNERMOST.set(what)
    try:
        yield
    finally:
        _INNERMOST.reset(around)
        watch.end()


def advance(parts: float = 1, of: str = "") -> None:
    """So many more parts are done. Args: of: the task whose parts they are; those of another are none of it."""
    watch = _WATCH.get()
    if watch is not None and of in ("", _INNERMOST.get()):
        watch.advance(parts)
