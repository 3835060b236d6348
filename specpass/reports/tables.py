"""A report as rich tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specpass.reports.cost import BREAK_EVENS, Costs, Forms
from specpass.reports.record import BackendRecord
from specpass.reports.text import BREAKS, LENGTHS, NEW_TOKENS, amount, break_even, budget_lines, said_lines

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
    "number, w weights of a layer; of quantised prompts C_q slots, q bytes of one and f of a low rank; _d the draft's, "
    "_p of the compressed prompt: C tokens read, W rows and n layers that score"
)


def tables(record: BackendRecord) -> Group:
    """The record for a terminal: graphs, sites and budgets, refusals, costs, formulas."""
    parts: list[RenderableType] = [Text(f"{record.method}, lowering={record.lowering}", style="bold"), _graphs(record)]
    if record.draft_seconds:
        parts.append(f"draft captured in {record.draft_seconds:.1f} s")
    parts += [Text(f"  {line}") for line in budget_lines(record)]
    parts += [Text(line) for line in said_lines(record)]
    parts += [Text(f"refused: {reason} (the model runs exactly)", style="red") for reason in record.refusals]
    costs = record.costs()
    if costs is None:
        parts.append("no costs: they are counted for dense decoders and the methods that specpass brings")
    elif not record.refusals:
        parts += [_numbers(costs), _formulas(costs)]
    return Group(*parts)


def _graphs(record: BackendRecord) -> Table:
    table = Table("graph", "sites found", "rewritten", "regions", "trace s", "passes s", "lowering s", "total s")
    for graph in record.graphs:
        found = "all refused" if graph.exact else str(len(graph.sites))
        table.add_row(
            graph.kind,
            found,
            "0 (exact)" if graph.exact else str(len(graph.sites)),
            f"{graph.distinct_regions} of {graph.regions}",
            f"{graph.trace_seconds:.1f}",
            f"{sum(graph.pass_seconds.values()):.2f}",
            f"{graph.lower_seconds:.1f}",
            f"{graph.seconds:.1f}",
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
    if any(held := [costs.held(length, NEW_TOKENS) for length in LENGTHS]):
        table.add_row("KV at once, until the lookahead was read", *(amount(value, "B") for value in held))
    breaks = ", ".join(f"{BREAKS[what]} {break_even(costs.break_even(what, NEW_TOKENS))}" for what in BREAK_EVENS)
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
