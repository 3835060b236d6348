"""Progress of a long run: a line per step, the time left by what was measured so far, and a limit to stop at."""

from __future__ import annotations

import sys
import time


class Pace:
    """Args: total: work of all steps, in any unit. minutes: no step is begun after so many."""

    def __init__(self, total: float, minutes: float) -> None:
        self.total, self.done, self.limit = total, 0.0, 60 * minutes
        self.start = time.perf_counter()

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.passed >= self.limit

    def left(self) -> float | None:
        """Seconds that the rest takes at the pace so far; None before the first step."""
        return self.passed * (self.total - self.done) / self.done if self.done else None

    def step(self, work: float, text: str) -> None:
        """A step is done: say so on stderr."""
        self.done += work
        left = self.left()
        share = f"{100 * self.done / self.total:3.0f} %" if self.total else "100 %"
        rest = "" if left is None else f", about {duration(left)} left"
        if left is not None and self.passed + left > self.limit:
            rest += f", stops in {duration(max(0.0, self.limit - self.passed))}"
        print(f"{share} {text} ({duration(self.passed)} passed{rest})", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """45 s, 12 min, 1 h 40 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
