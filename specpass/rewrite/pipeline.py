"""The runner: passes in their order, each checked against what it says of itself, observed, timed, skippable."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

from torch import fx

from specpass.rewrite.base import Pass, Refusal, Request
from specpass.rewrite.dump import dump_to_folder
from specpass.rewrite.facts import Facts
from specpass.rewrite.sites import Sites
from specpass.rewrite.stages import STAGES, check_stage
from specpass.rewrite.verify import StageError, verify

# Called as observer(request, name, graph) with a graph as it was traced ("traced") and after each pass, by its name.
Observer = Callable[[Request, str, fx.GraphModule], None]


class Pipeline:
    """A tuple of passes that rewrites graphs of one kind of model.

    Args:
        passes: in their order.
        entry: the stage of the graphs that come in; "" where stages mean nothing (plain ATen on its way to ONNX).
        skip: names of passes to leave out, for experiments (those of other tuples mean nothing here): what a skipped
            pass promises is then not so, and stages are not checked.
        full_verify: propagate fake values through the whole graph after each pass.
        observers: see Observer. They look, and change nothing.
    """

    def __init__(
        self,
        passes: tuple[Pass, ...],
        *,
        entry: str = "TRACED",
        skip: Iterable[str] = (),
        full_verify: bool = False,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.skip = frozenset(skip) & {item.name for item in passes}
        self.passes = tuple(item for item in passes if item.name not in self.skip)
        self.entry, self.full_verify = entry, full_verify
        self.observers = (*observers, dump_to_folder)
        self.seconds: dict[str, float] = {}

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> fx.GraphModule:
        """Rewrite `gm` in place, adding to `facts`; returns it.

        Raises: Refusal: see Pass. StageError: a pass does not keep its word.
        """
        planned = [item for item in self.passes if request.kind in item.kinds and item.applies(request)]
        self._check(gm, self.entry, "before the first pass", request, facts)
        if self.entry == "TRACED":
            self._observe(request, "traced", gm)
        for stage, group in itertools.groupby(planned, key=lambda item: item.stage):
            for item in group:
                self._run_one(item, gm, request, facts)
            self._check(gm, stage, f"after {item.name}", request, facts, left=True)
        gm.recompile()
        return gm

    def _run_one(self, item: Pass, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        start = time.perf_counter()
        missing = [fact.__name__ for fact in item.requires if fact not in facts]
        if missing and self.skip:
            raise Refusal(f"{item.name} needs {', '.join(missing)}, and {', '.join(sorted(self.skip))} is skipped")
        if missing:
            raise StageError(f"{item.name} needs {', '.join(missing)}, which no pass before it has said")
        item.run(gm, request, facts)
        unsaid = [fact.__name__ for fact in item.provides if fact not in facts]
        if unsaid:
            raise StageError(f"{item.name} promises {', '.join(unsaid)} and has not said so")
        verify(gm, item.name, full=self.full_verify)
        self._check(gm, item.stage, f"after {item.name}", request, facts)
        self.seconds[item.name] = self.seconds.get(item.name, 0.0) + time.perf_counter() - start
        self._observe(request, item.name, gm)

    def _check(
        self, gm: fx.GraphModule, stage: str, when: str, request: Request, facts: Facts, *, left: bool = False
    ) -> None:
        if stage and not (left and self.skip):
            known = facts.get(Sites)
            counts = (None, None) if known is None else (len(known.sites), len(known.owners))
            check_stage(gm, STAGES[stage], when, left=left, kind=request.kind, sites=counts[0], owners=counts[1])

    def _observe(self, request: Request, name: str, gm: fx.GraphModule) -> None:
        for observer in self.observers:
            observer(request, name, gm)


def check_names(names: Iterable[str], passes: tuple[Pass, ...]) -> None:
    """Raises: ValueError: a name that no pass has."""
    unknown = frozenset(names) - {item.name for item in passes}
    if unknown:
        known = ", ".join(item.name for item in passes)
        raise ValueError(f"skip_passes={sorted(unknown)}: no such pass; the passes are {known}")
