"""A report as data, as rich tables, and the cost lines of its text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from specpass.cost import BREAK_EVENS, Costs, Forms
from specpass.reporting import Report

LENGTHS = (4096, 32768, 131072)
NEW_TOKENS = 256
NAMES = {
    "kv_bytes": "KV cache",
    "prefill_flops": "prefill FLOPs",
    "prefill_bytes": "prefill bytes moved",
    "draft_flops": "draft FLOPs",
    "draft_bytes": "draft bytes moved",
    "decode_flops": "decode step FLOPs",
    "decode_bytes": "decode step bytes moved",
}
SYMBOLS = (
    "B batch, S prompt, L lookahead, W window, C slots of the budget, N free slots, M new tokens; n layers, E hidden "
    "size, H heads, K KV heads, D head size, I intermediate size, m matrices of an MLP, V vocabulary, b bytes of a "
    "number, w weights of a layer; _d the draft's, _p of the compressed prompt: C tokens read, W rows and n layers "
    "that score"
)
BREAKS = {"kv_bytes": "KV cache", "bytes": "bytes moved", "flops": "FLOPs"}


def data(report: Report, new_tokens: int = NEW_TOKENS, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """The report as JSON-serialisable data; `costs` is None where there is no closed form."""
    costs = report.costs()
    return {
        "method": report.method,
        "lowering": report.lowering,
        "draft_seconds": report.draft_seconds,
        "graphs": [
            {
                **dataclasses.asdict(record),
                "sites": [{"module": module, "budget": budget} for module, budget in record.sites],
            }
            for record in report.graphs
        ],
        "refusals": list(report.refusals),
        "foreign": report.foreign,
        "costs": None if costs is None else cost_data(costs, new_tokens, lengths),
    }


def cost_data(costs: Costs, new_tokens: int, lengths: Sequence[int]) -> dict[str, Any]:
    numbers = {length: costs.numbers(length, new_tokens) for length in lengths}
    return {
        "new_tokens": new_tokens,
        "batch": 1,
        "formulas": {name: {"full": str(costs.full[name]), "method": str(costs.pruned[name])} for name in NAMES},
        "values": {str(symbol): value for symbol, value in costs.values.items()},
        "numbers": {
            str(length): {name: {"full": pair[0], "method": pair[1]} for name, pair in found.items()}
            for length, found in numbers.items()
        },
        "break_even": {what: costs.break_even(what, new_tokens) for what in BREAK_EVENS},
    }


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


def tables(report: Report) -> Group:
    """The report for a terminal: graphs, sites and budgets, refusals, costs, formulas."""
    parts: list[Any] = [Text(f"{report.method}, lowering={report.lowering}", style="bold"), _graphs(report)]
    if report.draft_seconds:
        parts.append(f"draft captured in {report.draft_seconds:.1f} s")
    parts += [Text(f"  {line}") for line in budget_lines(report)]
    parts += [Text(f"refused: {reason} (the model runs exactly)", style="red") for reason in report.refusals]
    costs = report.costs()
    if costs is None:
        parts.append("no costs: they are counted for dense decoders and the methods that specpass brings")
    elif not report.refusals:
        parts += [_numbers(costs), _formulas(costs)]
    return Group(*parts)


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


def _graphs(report: Report) -> Table:
    table = Table("graph", "sites found", "rewritten", "regions", "trace s", "passes s", "lowering s", "total s")
    for record in report.graphs:
        found = "all refused" if record.exact else str(len(record.sites))
        table.add_row(
            record.kind,
            found,
            "0 (exact)" if record.exact else str(len(record.sites)),
            f"{record.distinct_regions} of {record.regions}",
            f"{record.trace_seconds:.1f}",
            f"{sum(record.pass_seconds.values()):.2f}",
            f"{record.lower_seconds:.1f}",
            f"{record.seconds:.1f}",
        )
    return table


def _names(costs: Costs) -> dict[str, str]:
    """The rows to show: a draft's only where there is one."""
    return {name: label for name, label in NAMES.items() if costs.full[name] or costs.pruned[name]}


def _numbers(costs: Costs) -> Table:
    table = Table(title=f"full KV -> {costs.method.name}, batch 1, {NEW_TOKENS} new tokens")
    table.add_column("")
    found = [costs.numbers(length, NEW_TOKENS) for length in LENGTHS]
    for length in LENGTHS:
        table.add_column(f"S = {length:,}", justify="right")
    for name, label in _names(costs).items():
        unit = "FLOP" if name.endswith("flops") else "B"
        table.add_row(label, *(" -> ".join(amount(value, unit) for value in row[name]) for row in found))
    breaks = ", ".join(f"{BREAKS[what]} {_break(costs.break_even(what, NEW_TOKENS))}" for what in BREAK_EVENS)
    table.caption = f"pays from a prompt of: {breaks}"
    return table


def _formulas(costs: Costs) -> Table:
    """The forms with one letter for the weights of a layer, which are a third of their length."""
    short = {Forms(index).layer(): Forms(index).w for index in ("", "d")}
    table = Table("", "full KV", costs.method.name, title="as formulas, for prompts longer than the budget")
    for name, label in _names(costs).items():
        table.add_row(label, *(str(forms[name].subs(short)) for forms in (costs.full, costs.pruned)))
    used = set().union(*(form.subs(short).free_symbols for form in costs.pruned.values()))
    weights = "; ".join(f"{letter} = {layer}" for layer, letter in short.items() if letter in used)
    values = ", ".join(f"{symbol}={value:,}" for symbol, value in sorted(costs.values.items(), key=str))
    table.caption_justify = "left"
    table.caption = f"{SYMBOLS}\n{weights}\n{values}"
    return table
