"""A report as JSON-serialisable data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from specpass.bits import GROUP, rank_of
from specpass.reports.cost import BREAK_EVENS, Costs
from specpass.reports.record import BackendRecord
from specpass.reports.tables import NAMES
from specpass.reports.text import LENGTHS, NEW_TOKENS


def data(record: BackendRecord, new_tokens: int = NEW_TOKENS, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """The report as JSON-serialisable data; `costs` is None where there is no closed form."""
    costs = record.costs()
    return {
        "method": record.method,
        "lowering": record.lowering,
        "draft_seconds": record.draft_seconds,
        "graphs": [dataclasses.asdict(graph) for graph in record.graphs],
        "interpreted": record.interpreted,
        "prompts": [dataclasses.asdict(prompt) for prompt in record.prompts],
        "devices": {device: list(parts) for device, parts in record.devices.items()},
        "notes": list(record.notes),
        "kept": None if record.kept is None else dataclasses.asdict(record.kept),
        "cache_bits": None if not record.bits else {"bits": record.bits, "group": GROUP, "rank": rank_of(record.bits)},
        "generated": None if record.bound is None else dataclasses.asdict(record.bound),
        "held": None if record.held is None else dataclasses.asdict(record.held),
        "replayed": record.replayed,
        "proposed": record.proposed,
        "accepted": record.accepted,
        "refusals": list(record.refusals),
        "foreign": record.foreign,
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
