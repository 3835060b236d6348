"""StreamingLLM: the first positions and the last."""

from __future__ import annotations

import dataclasses

from specpass.methods.base import Method, check_count


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """The first `sinks` positions and the last C - sinks. Source: arXiv 2309.17453."""

    sinks: int = 4

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 0)
        self._check_budget()
