"""What was compiled, what was refused and why: the data behind `specpass.report(model)`."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class GraphRecord:
    """One compiled graph. Seconds are wall-clock; `sites` are (module path, budget)."""

    kind: str
    exact: bool = False
    sites: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    trace_seconds: float = 0.0
    pass_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    lower_seconds: float = 0.0
    seconds: float = 0.0
    regions: int = 0
    distinct_regions: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """Everything that one backend has compiled. `str(report)` is readable; the fields are the data."""

    method: str
    lowering: str
    graphs: list[GraphRecord] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    foreign: int = 0
    draft_seconds: float = 0.0

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
                f"{record.kind} graph: {what}, {record.distinct_regions} distinct of {record.regions} regions compiled; "
                f"trace {record.trace_seconds:.1f} s, passes {passes:.2f} s, lowering {record.lower_seconds:.1f} s"
            )
            budgets = sorted({budget for _, budget in record.sites if budget})
            if budgets:
                lines.append(f"  budget per KV head and layer: {', '.join(map(str, budgets))} slots")
            lines += [f"  note: {note}" for note in record.notes]
        lines += [f"refused: {reason} (the model runs exactly)" for reason in self.refusals]
        if self.foreign:
            lines.append(f"{self.foreign} graph(s) without a BudgetCache run exactly")
        if not self.graphs and not self.foreign:
            lines.append("nothing compiled yet: call the model once")
        return "\n".join(lines)


def report(model: Any) -> Report:
    """The report of a model compiled with `specpass.compile` or `model.compile(backend=specpass.Backend(...))`.

    Raises: UnsupportedCallError when the model is not compiled with specpass.
    """
    from specpass.errors import UnsupportedCallError

    state = model.__dict__.get("_specpass")
    backend = state.backend if state is not None else _plain_backend(model)
    if backend is None:
        raise UnsupportedCallError("this model is not compiled with specpass: call specpass.compile(model, ...) first.")
    return backend.report


def _plain_backend(model: Any) -> Any:
    """The Backend inside model.compile(backend=...)'s compiled call, or None."""
    from specpass.backend import Backend

    call = getattr(model, "_compiled_call_impl", None)
    found = getattr(call, "_torchdynamo_orig_backend", None) or getattr(call, "get_compiler_config", None)
    seen: list[Any] = [found, call, *_closure(call)]
    for thing in seen:
        if isinstance(thing, Backend):
            return thing
    return None


def _closure(function: Any, depth: int = 4) -> list[Any]:
    if depth == 0 or function is None:
        return []
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            inner = cell.cell_contents
        except ValueError:
            continue
        found.append(inner)
        for name in ("callback", "_torchdynamo_orig_backend", "compiler_fn", "_orig_backend", "_inner_convert"):
            if hasattr(inner, name):
                found.append(getattr(inner, name))
                found += _closure(getattr(inner, name), depth - 1)
    return found
