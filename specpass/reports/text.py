"""A report as plain text, and the words that its tables share."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

from specpass.bits import GROUP, rank_of
from specpass.reports.cost import BREAK_EVENS, Costs
from specpass.reports.record import BackendRecord, GraphRecord, PromptRecord, SiteRecord
from specpass.rewrite.base import PROMPTS

LENGTHS = (4096, 32768, 131072)
NEW_TOKENS = 256
ANSWERS = 8  # of one prompt
SHARED = {  # by a method's spread
    "uniform": "",
    "heads": " in the mean: a layer's KV heads share them",
    "global": " in the mean: the KV heads of all layers share them",
}
BREAKS = {"kv_bytes": "KV cache", "bytes": "bytes moved", "flops": "FLOPs"}


def text(record: BackendRecord) -> str:
    """What was compiled, refused and left alone, and what it costs."""
    lines = [f"specpass: {record.method}, lowering={record.lowering}"]
    if record.draft_seconds:
        lines.append(f"draft captured in {record.draft_seconds:.1f} s")
    for graph in record.graphs:
        lines += graph_lines(graph)
    if record.replayed:
        lines.append(f"verified lookahead: {record.replayed:,} tokens of answers came free")
    if record.proposed:
        lines.append(f"speculation: {record.accepted:,} of {record.proposed:,} proposed tokens were taken")
    lines += said_lines(record)
    lines += [f"refused: {reason} (the model runs exactly)" for reason in record.refusals]
    if record.foreign:
        lines.append(f"{record.foreign} graph(s) without a BudgetCache run exactly")
    if not record.graphs and not record.foreign and not record.prompts:
        lines.append("nothing compiled yet: call the model once")
    costs = record.costs()
    if costs is not None and not record.refusals:
        lines += cost_lines(costs)
        if record.pruned_by.sparse_prefill:
            lines.append("FLOPs are those of exact attention: sparse_prefill takes fewer on long prompts")
    return "\n".join(lines)


def said_lines(record: BackendRecord) -> list[str]:
    """What became of calls, beside their graphs: of budgets, of what is held, of what ran uncompiled."""
    said = (kept_lines, bits_lines, bound_lines, held_lines, whole_lines, answers_lines, interpreted_lines)
    return [line for lines in said for line in lines(record)]


def kept_lines(record: BackendRecord) -> list[str]:
    """How budgets are chosen, which one was last, and which share of the attention each layer keeps."""
    kept, method = record.kept, record.pruned_by
    if method.share is None:
        return []
    how = f"each prompt gets the smallest size that keeps {method.share} of the attention; costs are the largest one's"
    if kept is None:
        return [how]
    short = "" if kept.share >= kept.asked else f", fewer than the {kept.asked} asked for: no larger size may be chosen"
    return [
        how,
        f"last choice: {kept.budget:,} slots keep {kept.share:.3f} of the attention{short}",
        f"  by layer: {' '.join(f'{share:.3f}' for share in kept.layers)}",
    ]


def bits_lines(record: BackendRecord) -> list[str]:
    """In how many bits prompts are held, in which groups, and which layers are not."""
    if not record.bits:
        return []
    rank = rank_of(record.bits)
    more = f", an outlier of each apart, and a low rank of {rank} for what is missing (GEAR)" if rank else ""
    lines = [
        f"cache: kept prompts in {record.bits} bits, groups of {GROUP} numbers with a scale and a zero{more}; what "
        "follows them in the model's dtype"
    ]
    graphs = [graph.sites for graph in record.graphs if graph.kind in PROMPTS and not graph.exact]
    for sites in [*graphs, *(prompt.sites for prompt in record.prompts)][:1]:
        reasons = collections.Counter(site.unquantized or site.exact for site in sites if not site.reads)
        lines += [f"  {count} layers in the model's dtype: {reason}" for reason, count in reasons.items() if reason]
    return lines


def bound_lines(record: BackendRecord) -> list[str]:
    """How many generated tokens are held, and which ones."""
    bound = record.bound
    if bound is None:
        return []
    many = f"{bound.kept(1):,} tokens stay"
    if bound.shared:
        many = f"{bound.slots - bound.kept(1):,} tokens of prompt or answer go, so that both share one budget"
    asked = f"; {bound.ahead:,} more are for the draft's lookahead, which says which" if bound.foresees else ""
    return [
        f"generated tokens: {bound.slots:,} slots of each KV head behind the prompt's; where they are full, "
        f"{many} (evict={bound.policy!r}); the newest {bound.window} stay{asked}"
    ]


def held_lines(record: BackendRecord) -> list[str]:
    """What lies in host memory for later turns."""
    held = record.held
    if held is None:
        return []
    rows = "" if held.rows == 1 else f" of each of {held.rows} rows"
    return [
        f"dropped='host': keys and values of {held.tokens:,} tokens{rows} lie in host memory, "
        f"{held.target_bytes / 2**20:,.1f} MiB of the target's and {held.draft_bytes / 2**20:,.1f} MiB of the draft's"
    ]


def whole_lines(record: BackendRecord) -> list[str]:
    """What the last lookahead of the target's own held on the device."""
    whole = record.whole
    if whole is None:
        return []
    rows = "" if whole.rows == 1 else f" of each of {whole.rows} rows"
    return [
        f"lookahead='self': keys and values of {whole.tokens:,} tokens{rows} lay on the device, "
        f"{amount(whole.whole_bytes, 'B')}, beside a pruned cache of {amount(whole.slots_bytes, 'B')} from which "
        f"{whole.lookahead} tokens were written, in {whole.lookahead - 1} steps"
    ]


def answers_lines(record: BackendRecord) -> list[str]:
    """What several answers of one prompt share, and which layers hold a copy for each, and why."""
    answers = record.answers
    if answers is None:
        return []
    lines = [f"answers: {answers.each} of each prompt, which was read once"]
    if answers.shared:
        held = amount(answers.prompt_bytes, "B")
        lines.append(f"  {answers.shared} layers hold its slots once, {held} and not {answers.each} times")
    return lines + [f"  {count} layers hold a copy for each: {reason}" for reason, count in answers.copied.items()]


def interpreted_lines(record: BackendRecord) -> list[str]:
    """What became of prompts that the model's own forward read, and why it did."""
    lines = []
    if record.interpreted:
        lines.append(
            f"interpreted: {record.interpreted}; the model's own forward runs, and its layers are pruned around it"
        )
    lines += [f"  {device}: {', '.join(parts)}" for device, parts in record.devices.items()]
    if record.prompts and record.pruned_by.sparse_prefill:
        lines.append("sparse_prefill: not in these prompts, whose attention is the model's own and exact")
    for prompt in record.prompts:
        lines += prompt_lines(prompt)
    return lines + [f"note: {note}" for note in record.notes]


def prompt_lines(prompt: PromptRecord) -> list[str]:
    own = [site for site in prompt.sites if not site.reads]
    pruned = [site for site in own if not site.exact]
    what = "kept whole, which fits the budget" if prompt.short else "pruned"
    lines = [f"prompt: {len(pruned)} of {len(own)} attention layers {what}"]
    budgets = sorted({site.budget for site in pruned})
    if budgets:
        lines.append(f"  budget per KV head and layer: {', '.join(map(str, budgets))} slots")
    kept = collections.Counter(site.exact for site in own if site.exact)
    lines += [f"  {count} exact: {reason}" for reason, count in kept.items()]
    lines += shared_lines(prompt.sites)
    if prompt.states:
        lines.append(f"  {prompt.states} layers with a state, kept exactly: {amount(prompt.state_bytes, 'B')} a row")
    if prompt.two_phases:
        lines.append("  the lookahead came behind the prompt: until then these layers' keys and values were whole")
    return lines


def shared_lines(sites: Sequence[SiteRecord]) -> list[str]:
    """Which layers read another's keys and values: these are whole until the last of them has read the prompt."""
    readers: dict[str, list[str]] = {}
    for site in sites:
        if site.reads:
            readers.setdefault(site.reads, []).append(site.module)
    return [
        f"  {owner}: its keys and values are read by {', '.join(modules)} too, and were whole until then"
        for owner, modules in readers.items()
    ]


def graph_lines(graph: GraphRecord) -> list[str]:
    what = "exact (refused)" if graph.exact else f"{len(graph.sites)} sites rewritten"
    passes = sum(graph.pass_seconds.values())
    lines = [
        f"{graph.kind} graph: {what}, {graph.distinct_regions} distinct of {graph.regions} regions compiled; "
        f"trace {graph.trace_seconds:.1f} s, passes {passes:.2f} s, lowering {graph.lower_seconds:.1f} s"
    ]
    pruned = [site for site in graph.sites if site.budget and not site.exact]
    budgets = sorted({site.budget for site in pruned})
    if budgets:
        shared = SHARED[pruned[0].spread]
        lines.append(f"  budget per KV head and layer: {', '.join(map(str, budgets))} slots{shared}")
    kept = collections.Counter(site.exact for site in graph.sites if site.exact)
    lines += [f"  {count} sites exact: {reason}" for reason, count in kept.items()]
    lines += shared_lines(graph.sites)
    counts = collections.Counter(str(choice) for _, choice in graph.choices)
    lines += [f"  {count} x {choice}" for choice, count in counts.items()]
    return lines + [f"  note: {note}" for note in graph.notes]


def cost_lines(costs: Costs, new_tokens: int = NEW_TOKENS) -> list[str]:
    """Lines for `str(report)`: cache, prefill with draft, decode step; full KV -> the method."""
    lines = []
    for length in LENGTHS:
        pair = costs.numbers(length, new_tokens)
        cache = " -> ".join(amount(value, "B") for value in pair["kv_bytes"])
        read = " -> ".join(amount(pair["prefill_flops"][i] + pair["draft_flops"][i], "FLOP") for i in (0, 1))
        step = " -> ".join(amount(value, "B") for value in pair["decode_bytes"])
        held = costs.held(length, new_tokens)
        until = f" (at once {amount(held, 'B')} until the lookahead was read)" if held else ""
        lines.append(
            f"at {length:,} tokens: KV cache {cache}{until}, prefill and draft {read}, a decode step moves {step}"
        )
    longest, several = LENGTHS[-1], costs.answers_bytes(LENGTHS[-1], new_tokens, ANSWERS)
    if several is not None:
        one = costs.numbers(longest, new_tokens)["kv_bytes"][1]
        lines.append(
            f"{ANSWERS} answers of one prompt of {longest:,} tokens: KV cache {amount(several, 'B')}, where a copy for "
            f"each would make it {amount(ANSWERS * one, 'B')}"
        )
    breaks = (f"{BREAKS[what]} {break_even(costs.break_even(what, new_tokens))}" for what in BREAK_EVENS)
    return [*lines, f"pays from a prompt of ({new_tokens} new tokens): {', '.join(breaks)}"]


def break_even(length: int | None) -> str:
    """The shortest prompt that pays, in words."""
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


def budget_lines(record: BackendRecord) -> list[str]:
    """Runs of sites with one budget: `model.layers.0.self_attn .. model.layers.27.self_attn: 1,024 slots`."""
    sites = next((graph.sites for graph in record.graphs if graph.sites and not graph.exact), [])
    lines = []
    for (budget, exact), run in itertools.groupby(sites, key=lambda site: (site.budget, site.exact)):
        paths = [site.module for site in run]
        where = f"{paths[0]} .. {paths[-1]}" if len(paths) > 1 else paths[0]
        lines.append(f"{where}: {budget:,} slots per KV head" + (f", exact ({exact})" if exact else ""))
    return lines
