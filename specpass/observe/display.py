"""Tasks on stderr: one bar at a time, which goes when its task is over; lines, where that is no terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from specpass.observe.progress import Watch, watching

EVERY = 5.0  # seconds between two lines


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """What takes long inside is shown on stderr: a compilation, the reading of a prompt, a conversion.

    with specpass.progress():
        out = model.generate(**inputs)
    """
    with watching(display()):
        yield


def display(console: Console | None = None) -> Watch:
    """Bars on a terminal, lines elsewhere; on stderr where no console is given."""
    console = console or Console(stderr=True, highlight=False)
    return Bars(console) if console.is_terminal else Lines(console)


class _Times(ProgressColumn):
    """Share done and time left; of a task of which nothing is done, or without a known end, the time that it took."""

    def render(self, task: Task) -> Text:
        if task.total is None or not task.completed:
            return Text(f"{task.elapsed or 0:.0f} s")
        left = task.time_remaining
        return Text(f"{task.percentage:.0f} %" + ("" if left is None else f", {left:.0f} s left"))


class Bars:
    """The innermost task as a bar, behind the names of those around it; nothing of it stays on the screen."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.names: list[str] = []
        self.bars: Progress | None = None

    def begin(self, what: str, total: float | None) -> None:
        if self.bars is None:  # a new one each time: a stopped one would erase what was printed since
            columns = (TextColumn("{task.description}"), BarColumn(), _Times())
            # The answer goes to stdout, and is no business of this console's.
            self.bars = Progress(
                *columns, console=self.console, transient=True, redirect_stdout=False, refresh_per_second=4
            )
            self.bars.start()
        if self.names:
            self.bars.update(self.bars.task_ids[-1], visible=False)
        self.names.append(what)
        self.bars.add_task(": ".join(self.names), total=total)

    def advance(self, parts: float) -> None:
        if self.bars is not None:
            self.bars.advance(self.bars.task_ids[-1], parts)

    def end(self) -> None:
        assert self.bars is not None, "ended by who began it"
        self.names.pop()
        self.bars.remove_task(self.bars.task_ids[-1])
        if self.names:
            self.bars.update(self.bars.task_ids[-1], visible=True)
        else:
            self.bars.stop()
            self.bars = None


@dataclasses.dataclass
class _Open:
    what: str
    total: float | None
    start: float
    done: float = 0.0


class Lines:
    """A line for what goes on for longer than EVERY seconds, and then each time that so many have passed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.open: list[_Open] = []
        self.said = 0.0

    def begin(self, what: str, total: float | None) -> None:
        now = time.monotonic()
        if not self.open:
            self.said = now
        self.open.append(_Open(what, total, now))
        self._say(now)

    def advance(self, parts: float) -> None:
        if self.open:
            self.open[-1].done += parts
            self._say(time.monotonic())

    def end(self) -> None:
        self.open.pop()

    def _say(self, now: float) -> None:
        if now - self.said < EVERY:
            return
        self.said, last = now, self.open[-1]
        text = ": ".join(task.what for task in self.open)
        if last.total and last.done:
            left = (now - last.start) * (last.total / last.done - 1)
            text += f", {last.done / last.total:.0%}, {left:.0f} s left"
        self.console.print(text, markup=False, soft_wrap=True)
