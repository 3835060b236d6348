"""Who looks ahead where there is no draft: the target itself, the prompt's own tokens, nobody; and the best possible.

One model answers the quality benchmark's separating tasks at small budgets with each lookahead: none (SnapKV), what
followed the prompt's last tokens before ("ngram"), what the model writes from SnapKV's choice ("self"), and what it
writes with all KV, as its own draft: no draft looks ahead better than that. Answers are decoded from the pruned cache
from their second token on (verify=False): what is scored is what was kept. `verified` is "self" as it comes.

    python -m bench.lookaheads
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import common
from specpass.benchmarks.models import generate, label
from specpass.benchmarks.pace import Pace
from specpass.benchmarks.results import Store
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.benchmarks.tasks.table import SEPARATING, TASKS
from specpass.methods.base import NGRAM, SELF, Method
from specpass.methods.snapkv import SnapKV
from specpass.methods.speckv import SpecKV

WINDOW, LENGTH = 32, 32
FULL, OWN = "full", "own draft"
ENGINES = (FULL, "snapkv", NGRAM, SELF, "verified", OWN)
KEY = ("engine", "budget", "task", "seed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--seeds", type=int, default=2, help="prompts of each task")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "lookaheads.json")
    return parser.parse_args()


def method_of(engine: str, budget: int) -> Method:
    if engine == "snapkv":
        return SnapKV(budget, WINDOW)
    if engine in (SELF, "verified"):  # answers have room for LENGTH tokens: see run
        return SpecKV(budget, WINDOW, lookahead=SELF, verify=engine == "verified")
    return SpecKV(budget, WINDOW, lookahead=NGRAM if engine == NGRAM else LENGTH, verify=False)


class Bench:
    """The model, the prompts and the store."""

    def __init__(self, args: argparse.Namespace) -> None:
        from specpass import hub

        self.args = args
        settings = {"kind": "lookaheads", "model": label(args.model), "dtype": args.dtype, "tokens": args.tokens}
        settings |= {"window": WINDOW, "lookahead": LENGTH, "lowering": args.lowering}
        self.store = Store(args.out, settings, KEY, args.restart, summary)
        self.model, self.tokenizer = hub.load(args.model, args.dtype)
        self.model.requires_grad_(False)
        self.prompts = [
            TASKS[task].prompt(seed, args.tokens, self.tokenizer) for seed in range(args.seeds) for task in SEPARATING
        ]

    def todo(self) -> list[tuple[str, int | None, list[Prompt]]]:
        """What has no record: engine, budget, prompts."""
        grid = [(engine, budget) for engine in self.args.engines for budget in self.args.budgets if engine != FULL]
        found = []
        for engine, budget in [(FULL, None), *grid] if FULL in self.args.engines else grid:
            prompts = [
                prompt for prompt in self.prompts if (engine, budget, prompt.task, prompt.seed) not in self.store
            ]
            found += [(engine, budget, prompts)] if prompts else []
        return found

    def run(self) -> None:
        import specpass

        work = self.todo()
        pace = Pace(sum(len(prompts) for _, _, prompts in work), float("inf"))
        for engine, budget, prompts in work:
            if budget is not None:
                draft, method = self.model if engine == OWN else None, method_of(engine, budget)
                specpass.compile(self.model, draft=draft, method=method, lowering=self.args.lowering)
            try:
                for prompt in prompts:
                    self._answer(engine, budget, prompt)
                    pace.step(1, f"{engine} {budget or ''} {prompt.task} {prompt.seed}")
            finally:
                specpass.restore(self.model)

    def _answer(self, engine: str, budget: int | None, prompt: Prompt) -> None:
        import specpass

        task, given, record = TASKS[prompt.task], {}, {}
        if budget is not None:  # so that a lookahead of the prompt's or the target's own has LENGTH tokens too
            cache = specpass.BudgetCache(
                self.model.config, method_of(engine, budget), max_new_tokens=max(task.new_tokens, LENGTH)
            )
            given["past_key_values"] = cache
        free = specpass.report(self.model).replayed if budget is not None else 0
        tokens = generate(self.model, prompt, task.new_tokens, self.tokenizer.pad_token_id or 0, **given)
        if budget is not None:
            report = specpass.report(self.model)
            record["free_tokens"] = report.replayed - free
            if cache.lookahead_ids is not None:
                record["lookahead"] = cache.lookahead_ids[0].tolist()
            if report.whole is not None:
                record |= {"whole_bytes": report.whole.whole_bytes, "slots_bytes": report.whole.slots_bytes}
        scored = task.scored(prompt, tokens, self.tokenizer)
        who = dict(zip(KEY, (engine, budget, prompt.task, prompt.seed), strict=True))
        self.store.add({**who, "prompt_tokens": len(prompt.ids), **record, **scored})


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each engine and budget: the mean score, over all prompts and by task, and how far its lookahead is full KV's.

    `agrees`: tokens of the lookahead in front of the first that is not full KV's answer, in the mean.
    """
    listed = list(records)
    full = {(r["task"], r["seed"]): r["tokens"] for r in listed if r["engine"] == FULL}
    found = []
    for engine, budget in dict.fromkeys((r["engine"], r["budget"]) for r in listed):
        own = [r for r in listed if (r["engine"], r["budget"]) == (engine, budget)]
        tasks = {task: [r["score"] for r in own if r["task"] == task] for task in SEPARATING}
        entry: dict[str, Any] = {"engine": engine, "budget": budget, "prompts": len(own)}
        entry["score"] = round(statistics.mean(r["score"] for r in own), 3)
        entry["tasks"] = {task: round(statistics.mean(scores), 3) for task, scores in tasks.items() if scores}
        pairs = [(r["lookahead"], full.get((r["task"], r["seed"]), [])) for r in own if "lookahead" in r]
        if pairs:
            entry["agrees"] = round(statistics.mean(common_start(*pair) for pair in pairs), 1)
        found.append(entry)
    return found


def common_start(ours: list[int], theirs: list[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def show(summary: list[dict[str, Any]]) -> None:
    table = Table("lookahead", "budget", "score", *SEPARATING, "tokens as full KV's")
    for entry in summary:
        tasks = [f"{entry['tasks'][task]:.2f}" if task in entry["tasks"] else "-" for task in SEPARATING]
        agrees = str(entry.get("agrees", "-"))
        score, budget = f"{entry['score']:.2f}", str(entry["budget"] or "-")
        table.add_row(entry["engine"], budget, score, *tasks, agrees)
    Console().print(table)


def main() -> None:
    args = arguments()
    bench = Bench(args)
    bench.run()
    show(bench.store.parts["summary"])
    print(f"wrote {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
