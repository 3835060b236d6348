"""docs/coverage.md from a coverage file: the same records make the same page."""

from __future__ import annotations

import collections
from typing import Any

_HEAD = """# Coverage

Every family that transformers registers for causal language models, built tiny and random (float32, a few layers, wide
weights) and run through `specpass.compile` with eager lowering. Made by `specpass coverage`; records, machine and
versions are in `bench/results/coverage.json`.

- **layers**: what the plain model's cache holds: full (every token), sliding (the last ones, or those of a chunk),
  state. **pruned**: layers that keep {budget} slots of a {long}-token prompt under SpecKV with a draft; the other full
  ones, and all that slide or recur, are exact, for the reason given;
  "uncompiled": the model's own forward runs, pruned around its attention, because no graph of it can be had.
- **SpecPC**: that the target's answer is the plain model's to the tokens that were read, with the model as its own
  draft, or with a tiny Llama where that cannot be captured.
- **batch**: that a padded batch of pruned prompts is answered as its rows alone; "as plain": the plain model's own
  padded batch is not.
- **bytes**: that the cache occupies what the formula says (5 %).
- **verdict**: *pruned* in all full layers; *in part*; *exact*, with the reason; *nothing to prune*; *wrong*, *error*,
  *traceback* are faults. Except for faults, prompts that fit the budget are answered token for token as by the plain
  model, also when they are drafted, scored and gathered all the same.
"""
ORDER = ("pruned", "in part", "exact", "nothing to prune", "wrong", "error", "traceback")
TRIED = frozenset(ORDER)


def page(document: dict[str, Any]) -> str:
    """The page of a coverage file's document."""
    records = sorted(document["results"], key=lambda record: record["family"])
    settings, versions = document["settings"], document["versions"]
    tried = [record for record in records if record["verdict"] in TRIED]
    counts = collections.Counter(record["verdict"] for record in tried)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
    lines = [
        _HEAD.format(budget=settings["budget"], long=max(settings["prompts"])),
        f"transformers {versions['transformers']}, torch {versions['torch']}. {len(tried)} families tried: {summary}.",
        "",
        "| family | layers | pruned | exact layers and why | SpecPC | batch | bytes | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(record) for record in tried),
        "",
        "## Not tried",
        "",
        *_others([record for record in records if record["verdict"] not in TRIED]),
    ]
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any]) -> str:
    faults = record["faults"]
    layers = record.get("layers", {})
    full = layers.get("full", 0)
    why = list(record.get("reasons", ()))
    if record.get("interpreted"):
        why.append(f"uncompiled: {record['interpreted']}")
    exact = "; ".join(why)
    cells = (
        record["family"],
        ", ".join(f"{count} {kind}" for kind, count in layers.items()),
        f"{record.get('pruned', 0)} of {full}" if full else "",
        exact,
        "**no**" if "specpc" in faults else _words(record.get("specpc", "")),
        record.get("batch", "**no**"),
        "**no**" if "pruned" in faults else "yes",
        record["verdict"] if not faults else f"**{record['verdict']}**: {next(iter(faults.values()))}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _words(specpc: str) -> str:
    return {"own": "yes", "llama": "yes, Llama draft"}.get(specpc, f"exact: {specpc}" if specpc else "exact")


def _others(records: list[dict[str, Any]]) -> list[str]:
    """Families by reason."""
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for record in records:
        by_reason[f"{record['verdict']}: {record['reasons'][0]}"].append(record["family"])
    return [f"- {reason}: {', '.join(families)}" for reason, families in sorted(by_reason.items())]
