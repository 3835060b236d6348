"""Who watches in tests: every task, with what was told of it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Told:
    """A task by the names of those around it and its own."""

    path: tuple[str, ...]
    total: float | None
    done: float = 0
    over: bool = False


class Recorder:
    def __init__(self) -> None:
        self.tasks: list[Told] = []
        self._open: list[Told] = []

    def begin(self, what: str, total: float | None) -> None:
        path = (*self._open[-1].path, what) if self._open else (what,)
        self._open.append(Told(path, total))
        self.tasks.append(self._open[-1])

    def advance(self, parts: float) -> None:
        if self._open:
            self._open[-1].done += parts

    def end(self) -> None:
        self._open.pop().over = True
