"""What was compiled, what was refused and why: the data behind `specpass.report(model)`."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specpass.reports.cost import Costs
    from specpass.rewrite.base import Kind
    from specpass.sizes import Decoder

_NUMBER = itertools.count()


@dataclasses.dataclass
class GraphRecord:
    """One compiled graph. Seconds are wall-clock; `sites` are (module path, budget)."""

    kind: Kind
    exact: bool = False
    sites: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    trace_seconds: float = 0.0
    pass_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    lower_seconds: float = 0.0
    seconds: float = 0.0
    regions: int = 0
    distinct_regions: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    choices: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (module path, kernel or aten and why)


@dataclasses.dataclass(eq=False)
class Report:
    """Everything that one backend has compiled. `str(report)` is readable; rich prints it as tables; `data()` is JSON.

    `sizes` are those of target and draft where they are not to be read from the models' configs.
    """

    method: str
    lowering: str
    graphs: list[GraphRecord] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    foreign: int = 0
    draft_seconds: float = 0.0
    configs: list[Any] = dataclasses.field(default_factory=list, repr=False)  # of the targets seen
    about: Any = dataclasses.field(default=None, repr=False)  # the method
    draft_config: Any = dataclasses.field(default=None, repr=False)
    sizes: tuple[Decoder | None, Decoder | None] | None = dataclasses.field(default=None, repr=False)
    number: int = dataclasses.field(default_factory=lambda: next(_NUMBER), repr=False)

    def __post_init__(self) -> None:
        _KNOWN.add(self)

    def describe(self, method: Any, draft: Any) -> None:
        """What the costs are computed from, besides the target."""
        self.about, self.draft_config = method, getattr(draft, "config", None)

    def costs(self) -> Costs | None:
        """Closed forms of what the method costs; None before the first call, or where none is known."""
        from specpass.reports.cost import costs_of
        from specpass.sizes import Decoder

        target, draft = self.sizes or (None, None)
        if self.sizes is None and self.configs:
            target = Decoder.of(self.configs[-1])
            draft = None if self.draft_config is None else Decoder.of(self.draft_config)
        return None if target is None or self.about is None else costs_of(self.about, target, draft)

    def data(self, new_tokens: int = 256) -> dict[str, Any]:
        """Everything as JSON-serialisable data; costs for a generation of `new_tokens`."""
        from specpass.reports.data import data

        return data(self, new_tokens)

    def __rich__(self) -> Any:
        from specpass.reports.tables import tables

        return tables(self)

    def saw(self, config: Any) -> None:
        if not any(config is seen for seen in self.configs):
            self.configs.append(config)

    def refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)

    def __str__(self) -> str:
        lines = [f"specpass: {self.method}, lowering={self.lowering}"]
        if self.draft_seconds:
            lines.append(f"draft captured in {self.draft_seconds:.1f} s")
        for record in self.graphs:
            what = "exact (refused)" if record.exact else f"{len(record.sites)} sites rewritten"
            passes = sum(record.pass_seconds.values())
            lines.append(
                f"{record.kind} graph: {what}, {record.distinct_regions} distinct of {record.regions} "
                f"regions compiled; "
                f"trace {record.trace_seconds:.1f} s, passes {passes:.2f} s, lowering {record.lower_seconds:.1f} s"
            )
            budgets = sorted({budget for _, budget in record.sites if budget})
            if budgets:
                lines.append(f"  budget per KV head and layer: {', '.join(map(str, budgets))} slots")
            counts = collections.Counter(str(choice) for _, choice in record.choices)
            lines += [f"  {count} x {choice}" for choice, count in counts.items()]
            lines += [f"  note: {note}" for note in record.notes]
        lines += [f"refused: {reason} (the model runs exactly)" for reason in self.refusals]
        if self.foreign:
            lines.append(f"{self.foreign} graph(s) without a BudgetCache run exactly")
        if not self.graphs and not self.foreign:
            lines.append("nothing compiled yet: call the model once")
        costs = self.costs()
        if costs is not None and not self.refusals:
            from specpass.reports.text import cost_lines

            lines += cost_lines(costs)
        return "\n".join(lines)


def report(model: Any) -> Report:
    """The report of a model compiled with specpass, by whichever door.

    Raises: UnsupportedCallError when the model is not compiled with specpass, or was never called.
    """
    from specpass.errors import UnsupportedCallError

    state = model.__dict__.get("_specpass")
    if state is not None:
        return state.backend.report
    config = model.config.get_text_config(decoder=True)
    found = [known for known in _KNOWN if any(config is seen for seen in known.configs)]
    if not found:
        raise UnsupportedCallError(
            "this model is not compiled with specpass, or was not called yet: use specpass.compile(model, ...) or call "
            "the compiled model once."
        )
    return max(found, key=lambda known: known.number)


# Reports whose backends are alive: through torch.compile's own doors a model does not know its backend.
_KNOWN: weakref.WeakSet[Report] = weakref.WeakSet()
