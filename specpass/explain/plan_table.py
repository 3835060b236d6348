"""A plan as a rich table."""

from __future__ import annotations

from rich.table import Table

from specpass.explain.plan import PEAKS, WORK, Plan
from specpass.reports.text import amount

LABELS = {"flops": "FLOPs", "bytes": "bytes moved", "sent": "bytes sent to others"}


def table(plan: Plan) -> Table:
    """One row for each amount of a device: full KV, the method."""
    many = "one device" if plan.devices == 1 else f"each of {plan.devices} devices"
    shown = Table("", title=f"{plan.tokens:,} tokens, {many}", title_justify="left", caption_justify="left")
    shown.add_column("full KV", justify="right")
    shown.add_column(plan.method.split("(")[0], justify="right")
    for name, pair in plan.held.items():
        shown.add_row(name, *(amount(value, "B") for value in pair), style="bold" if name in PEAKS else None)
    for phase, label in WORK.items():
        found = plan.work.get(phase)
        if found is None:
            continue
        shown.add_section()
        for name, unit in (("flops", "FLOP"), ("bytes", "B"), ("sent", "B")):
            if name != "sent" or any(found["sent"]):
                shown.add_row(f"{label}: {LABELS[name]}", *(amount(value, unit) for value in found[name]))
        shown.add_row(f"{label}: at least", *(seconds(value) for value in found["seconds"]), style="bold")
    rates = f"{plan.arch.name}: {plan.arch.flops / 1e12:,.0f} TFLOP/s, {plan.arch.bandwidth / 1e12:.2f} TB/s"
    shown.caption = "\n".join([plan.method, f"{rates}, by data sheet", *plan.notes])
    return shown


def seconds(value: float) -> str:
    """0.00123 -> 1.23 ms."""
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:,.2f} ms"
