"""Whole answers of the quality grid's prompts: seconds to the first token and to the last, by turns in one process.

Full KV uncompiled, SpecKV, SpecKV with a draft that goes on (speculate=4), SpecKV with sparse prefill, and SpecPC. Each
prompt is answered by every engine, one after the other, so that a busy machine slows all. Counted beside: tokens that
came free (the answer followed the lookahead) and proposals that were taken.

    python -m bench.whole_answers
    python -m bench.whole_answers --lengths 2048 --seeds 1 --engines full,speckv
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common

ENGINES = ("full", "speckv", "speckv_unverified", "speckv_speculate", "speckv_sparse", "specpc")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--lengths", default="2048,4096,8192", help="prompt lengths in tokens")
    parser.add_argument("--tasks", default="", help="of the quality grid; its separating tasks if left out")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--restart", action="store_true", help="forget what the file holds")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "whole_answers.json")
    return parser.parse_args()


def engine(name: str, args: argparse.Namespace, target: Any, draft: Any) -> Any:
    """The target as the engine calls it."""
    import specpass

    target = common.twin(target)
    kv = {"budget": args.budget, "window": 32, "lookahead": 32}
    methods = {
        "speckv": specpass.SpecKV(**kv),
        "speckv_unverified": specpass.SpecKV(**kv, verify=False),
        "speckv_speculate": specpass.SpecKV(**kv),
        "speckv_sparse": specpass.SpecKV(**kv, sparse_prefill=2048),
        "specpc": specpass.SpecPC(budget=1024),
    }
    if name == "full":
        return target
    speculate = 4 if name == "speckv_speculate" else 0
    return specpass.compile(target, draft=draft, method=methods[name], speculate=speculate)


def counts(model: Any) -> dict[str, int]:
    import specpass

    if "_specpass" not in model.__dict__:
        return {}
    report = specpass.report(model)
    return {"free": report.replayed, "proposed": report.proposed, "accepted": report.accepted}


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of each length and engine: medians, ratios to full KV on the same prompts, scores, free tokens a prompt."""
    groups: dict[tuple[int, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["length"], record["engine"]), {})[record["task"], record["seed"]] = record
    found: dict[str, Any] = {}
    for (length, name), own in sorted(groups.items()):
        full = groups.get((length, "full"), {})
        both = [(record, full[key]) for key, record in own.items() if key in full]
        entry: dict[str, Any] = {
            "prompts": len(own),
            "first_token_s": common.median((record["first_token_s"] for record in own.values()), 3),
            "total_s": common.median((record["total_s"] for record in own.values()), 3),
            "score": round(sum(record["score"] for record in own.values()) / len(own), 4),
        }
        for what in ("first_token_s", "total_s"):
            if both:
                ratios = [record[what] / theirs[what] for record, theirs in both]
                entry[f"{what}_ratio"], entry[f"{what}_ratio_worst"] = common.median(ratios, 3), round(max(ratios), 3)
        for what in ("free", "proposed", "accepted"):
            if name not in ("full", "specpc"):
                entry[f"{what}_per_prompt"] = round(sum(record.get(what, 0) for record in own.values()) / len(own), 2)
        found[f"{length}/{name}"] = entry
    return found


def main() -> None:
    args = arguments()
    from specpass.benchmarks import results
    from specpass.benchmarks.tasks.table import SEPARATING, TASKS

    names = [name for name in args.engines.split(",") if name]
    tasks = [name for name in args.tasks.split(",") if name] or list(SEPARATING)
    lengths = [int(length) for length in args.lengths.split(",")]
    settings = {
        "target": Path(args.target).name,
        "draft": Path(args.draft).name,
        "dtype": "bfloat16",
        "budget": args.budget,
        "speculate": 4,
    }
    store = results.Store(args.out, settings, ("engine", "task", "length", "seed"), args.restart, summarise)
    cells = [(t, n, s) for n in lengths for s in range(args.seeds) for t in tasks]
    due = [cell for cell in cells if any((name, *cell) not in store for name in names)]
    if not due:
        return
    tokenizer, target, draft = (
        common.load_tokenizer(args.target),
        common.load_model(args.target),
        common.load_model(args.draft),
    )
    engines = {name: engine(name, args, target, draft) for name in names}
    for model in track(engines.values(), "compiling"):  # graphs serve every length
        common.answer(model, list(range(100, 100 + 4500)), 40)
    for task, length, seed in track(due, "answers"):
        prompt = TASKS[task].prompt(seed, length, tokenizer)
        for name, model in engines.items():
            if (name, task, length, seed) in store:
                continue
            before = counts(model)
            timed = common.answer(model, list(prompt.ids), 64)
            found = {"first_token_s": round(timed.first_s, 3), "total_s": round(timed.total_s, 3)}
            scored = TASKS[task].scored(prompt, timed.tokens, tokenizer)
            more = {what: now - before[what] for what, now in counts(model).items()}
            store.add({"engine": name, "task": task, "length": length, "seed": seed, **scored, **found, **more})
    print(store.parts["summary"])


if __name__ == "__main__":
    main()
