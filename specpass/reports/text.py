"""The cost and budget lines of a report's text."""

from __future__ import annotations

import itertools

from specpass.reports.cost import BREAK_EVENS, Costs
from specpass.reports.record import Report

LENGTHS = (4096, 32768, 131072)
NEW_TOKENS = 256
BREAKS = {"kv_bytes": "KV cache", "bytes": "bytes moved", "flops": "FLOPs"}


def cost_lines(costs: Costs, new_tokens: int = NEW_TOKENS) -> list[str]:
    """Lines for `str(report)`: cache, prefill with draft, decode step; full KV -> the method."""
    lines = []
    for length in LENGTHS:
        pair = costs.numbers(length, new_tokens)
        cache = " -> ".join(amount(value, "B") for value in pair["kv_bytes"])
        read = " -> ".join(amount(pair["prefill_flops"][i] + pair["draft_flops"][i], "FLOP") for i in (0, 1))
        step = " -> ".join(amount(value, "B") for value in pair["decode_bytes"])
        lines.append(f"at {length:,} tokens: KV cache {cache}, prefill and draft {read}, a decode step moves {step}")
    breaks = (f"{BREAKS[what]} {_break(costs.break_even(what, new_tokens))}" for what in BREAK_EVENS)
    return [*lines, f"pays from a prompt of ({new_tokens} new tokens): {', '.join(breaks)}"]


def _break(length: int | None) -> str:
    return "never" if length is None else f"{length:,} tokens"


def amount(value: float, unit: str) -> str:
    """12,345,678 B -> 11.8 MiB; FLOPs in powers of 1,000."""
    base = 1024 if unit == "B" else 1000
    prefixes = ("", "Ki", "Mi", "Gi", "Ti", "Pi") if unit == "B" else ("", "k", "M", "G", "T", "P")
    for prefix in prefixes[:-1]:
        if abs(value) < base:
            return f"{value:.0f} {unit}" if not prefix else f"{value:.1f} {prefix}{unit}"
        value /= base
    return f"{value:,.1f} {prefixes[-1]}{unit}"


def budget_lines(report: Report) -> list[str]:
    """Runs of sites with one budget: `model.layers.0.self_attn .. model.layers.27.self_attn: 1,024 slots`."""
    sites = next((record.sites for record in report.graphs if record.sites and not record.exact), [])
    lines = []
    for budget, run in itertools.groupby(sites, key=lambda site: site[1]):
        paths = [module for module, _ in run]
        lines.append(
            f"{paths[0]} .. {paths[-1]}: {budget:,} slots per KV head"
            if len(paths) > 1
            else f"{paths[0]}: {budget:,} slots per KV head"
        )
    return lines
