"""Small budgets: every prompt is read once, and every way of spending a budget answers from that reading.

Prompts are those of `specpass bench quality`. Target and draft read all but a prompt's last W tokens (`specpass.read`);
each engine then asks with these, which keeps and answers what the whole prompt would, and costs its rows and its steps
alone. The draft's lookahead is written once too. No lookahead is verified unless `--verify` says so: full KV's own
logits would answer in the slots' place. Records are written one by one, and a rerun goes on where it stopped.

    python -m bench.budgets --length 2048 --budgets 64 128 --seeds 8                      # the Qwen pair
    python -m bench.budgets --length 2048 --dtype float32 --out bench/results/budgets_float32.json
    python -m bench.budgets --length 1200 --budgets 64 --seeds 2 --draft qwen2.5-coder-0.5b --target qwen2.5-coder-0.5b
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench import common
from bench.scores import SCORES
from specpass import BudgetCache, SnapKV, SpecKV, StreamingLLM, compile, read
from specpass.benchmarks import results
from specpass.benchmarks.models import Pair, generate, label, told
from specpass.benchmarks.peers import run as peers
from specpass.benchmarks.quality.summary import summarise as by_method
from specpass.benchmarks.quality.variants import FULL, Variant
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.benchmarks.tasks.table import SEPARATING, TASKS, check_task
from specpass.methods.base import Method, Scored

KEY = ("method", "budget", "task", "length", "seed")
FUTURES = 4
ANY = 0.5  # of a compiled model whose caches bring budgets of their own


@dataclasses.dataclass(frozen=True)
class KeyDiff(Scored):
    """What stays is unlike the mean of all keys, whatever is asked (KeyDiff, arXiv 2504.15364)."""

    kernel: int = 1

    def score(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        unit = torch.nn.functional.normalize(key.float(), dim=-1)
        return 1 - torch.cosine_similarity(unit, unit.mean(2, keepdim=True), dim=-1)


@dataclasses.dataclass(frozen=True)
class Random(Scored):
    """What stays is drawn by position, the same of every prompt; other heads draw others."""

    kernel: int = 1

    def score(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, lengths: Tensor, scale: float) -> Tensor:
        drawn = torch.rand(key.shape[1:3], generator=torch.Generator().manual_seed(0))
        return drawn.to(key.device).expand(key.shape[0], -1, -1).contiguous()


def scored(cls: type[Scored], given: argparse.Namespace, budget: Any, **own: Any) -> Method:
    return cls(budget=budget, window=given.window, **own)


def speckv(cls: type[SpecKV] = SpecKV, **own: Any) -> Callable[..., Method]:
    """SpecKV, or one with another score: see bench/scores.py."""
    return lambda given, budget: scored(cls, given, budget, lookahead=given.lookahead, verify=given.verify, **own)


def oracle(**own: Any) -> Callable[..., Method]:
    """SpecKV that is told full KV's answer, and does not follow it."""
    return lambda given, budget: scored(SpecKV, given, budget, lookahead=given.lookahead, verify=False, **own)


def snapkv(spread: str = "uniform") -> Callable[..., Method]:
    return lambda given, budget: scored(SnapKV, given, budget, spread=spread)


# Names of what is compared; their order is that in which a prompt is asked.
ENGINES: dict[str, Callable[[argparse.Namespace, Any], Method]] = {
    FULL: lambda given, budget: scored(SnapKV, given, budget),
    "speckv": speckv(),
    "speckv heads": speckv(spread="heads"),
    "speckv global": speckv(spread="global"),
    "speckv norms": speckv(value_norms=True),
    "speckv norms global": speckv(value_norms=True, spread="global"),
    "speckv futures": speckv(futures=FUTURES),
    "speckv futures global": speckv(futures=FUTURES, spread="global"),
    "speckv futures norms global": speckv(futures=FUTURES, value_norms=True, spread="global"),
    "speckv reconstruction": speckv(reconstruction=True),
    "speckv reconstruction global": speckv(reconstruction=True, spread="global"),
    "speckv futures reconstruction global": speckv(futures=FUTURES, reconstruction=True, spread="global"),
    "oracle": oracle(),
    "oracle global": oracle(spread="global"),
    "snapkv": snapkv(),
    "snapkv heads": snapkv("heads"),
    "snapkv global": snapkv("global"),
    "streamingllm": lambda given, budget: StreamingLLM(budget),
    "keydiff": lambda given, budget: scored(KeyDiff, given, budget),
    "random": lambda given, budget: scored(Random, given, budget),
    **{f"speckv {name}": speckv(cls) for name, cls in SCORES.items()},
    **{f"speckv {name} global": speckv(cls, spread="global") for name, cls in SCORES.items()},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--length", type=int, default=2048, help="of prompts, in tokens, question included")
    parser.add_argument("--budgets", type=int, nargs="+", default=(64, 128), help="slots of a KV head in the mean")
    parser.add_argument("--tasks", nargs="+", default=SEPARATING, help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=8, help="seeds 0 .. N-1")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=tuple(ENGINES), metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=peers.PRESSES, default=(), metavar="NAME", help="kvpress's own")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument(
        "--verify", action="store_true", help="answers follow the draft's lookahead by full KV's logits"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "budgets.json")
    given = parser.parse_args()
    for name in given.tasks:
        check_task(name)
    if FULL not in given.engines:  # whose answers the oracle is told, and scores are measured by
        given.engines = (FULL, *given.engines)
    return given


class Bench:
    """The pair, one compiled model for each engine over the same weights, and the store."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        names = ("window", "lookahead", "verify", "dtype", "lowering")
        settings = {"kind": "budgets", **{name: getattr(given, name) for name in names}}
        settings |= {"target": label(given.target), "draft": label(given.draft), "device": given.device}
        self.store = results.Store(given.out, settings, KEY, given.restart, summarise)
        self.pair = Pair(given.target, given.draft, given.dtype, given.device)
        self.pad = self.pair.tokenizer.pad_token_id or 0
        self.models: dict[str, Any] = {}

    def model(self, engine: str) -> Any:
        """The target, compiled for an engine's method; its caches bring their budgets."""
        if engine not in self.models:
            method = ENGINES[engine](self.given, ANY)
            draft = self.pair.draft if method.needs_draft else None
            twin = common.twin(self.pair.target)
            self.models[engine] = compile(twin, draft=draft, method=method, lowering=self.given.lowering)
        return self.models[engine]

    def missing(self, task: str, seed: int, engines: Iterable[str]) -> list[tuple[str, int | None]]:
        """Engines and budgets without a record of this prompt."""
        cells = [(engine, b) for engine in engines for b in ((None,) if engine == FULL else self.given.budgets)]
        return [cell for cell in cells if (*cell, task, self.given.length, seed) not in self.store]

    def prompts(self) -> list[tuple[str, int]]:
        return [(task, seed) for seed in range(self.given.seeds) for task in self.given.tasks]

    def run(self) -> None:
        todo = {key: found for key in self.prompts() if (found := self.missing(*key, self.given.engines))}
        with Progress() as progress:
            bar = progress.add_task("", total=sum(map(len, todo.values())))
            for (task, seed), cells in todo.items():
                name = f"{task} {self.given.length} seed {seed}"
                progress.update(bar, description=f"{name}: reading")
                prompt = TASKS[task].prompt(seed, self.given.length, self.pair.tokenizer)
                since = time.perf_counter()
                document = torch.tensor(prompt.ids[: -self.given.window])
                prefix, ahead = read(self.model("speckv"), document), None
                seconds = {"read_seconds": round(time.perf_counter() - since, 2)}
                for engine, budget in cells:
                    progress.update(bar, description=f"{name}: {engine}")
                    ahead = self.answer(prompt, prefix, engine, budget, ahead, seconds)
                    found = self.store[engine, budget, task, self.given.length, seed]
                    cell = f"{engine} {budget or ''}".rstrip()
                    progress.console.print(
                        f"{name}: {cell}: {found['score']:.2f}, {found['seconds']} s", highlight=False
                    )
                    progress.advance(bar)

    def answer(
        self, prompt: Prompt, prefix: Any, engine: str, budget: int | None, ahead: Any, seconds: dict[str, float]
    ) -> Any:
        """Ask, score and note. Args: ahead: what the draft wrote, once it has. Returns: that."""
        given, model, new = self.given, self.model(engine), TASKS[prompt.task].new_tokens
        method, rows = ENGINES[engine](given, budget or len(prompt.ids)), None
        if engine.startswith("oracle"):
            full = self.store[FULL, None, prompt.task, given.length, prompt.seed]["tokens"]
            rows = told(full, model.generation_config.eos_token_id, self.pad)
        elif method.drafts and method.futures == 1:
            rows = ahead
        since = time.perf_counter()
        cache = BudgetCache(model.config, method, max_new_tokens=new, lookahead_ids=rows)
        question = dataclasses.replace(prompt, ids=prompt.ids[-given.window :])
        tokens = generate(model, question, new, self.pad, prefix=prefix, past_key_values=cache)
        self.note(prompt, engine, budget, tokens, time.perf_counter() - since, **seconds)
        wrote = engine == "speckv" and cache.lookahead_ids is not None  # nothing where all of a prompt is kept
        return cache.lookahead_ids.tolist() if wrote else ahead

    def note(
        self, prompt: Prompt, engine: str, budget: int | None, tokens: list[int], took: float, **more: Any
    ) -> None:
        key = dict(zip(KEY, (engine, budget, prompt.task, self.given.length, prompt.seed), strict=True))
        scored = TASKS[prompt.task].scored(prompt, tokens, self.pair.tokenizer)
        self.store.add({**key, "prompt_tokens": len(prompt.ids), **scored, "seconds": round(took, 2), **more})

    def run_peers(self) -> None:
        """Those of other implementations: each prompt is read once for all of them, in their own environment."""
        work = []
        for task, seed in self.prompts():
            cells = self.missing(task, seed, self.given.peers)
            if cells:
                prompt = TASKS[task].prompt(seed, self.given.length, self.pair.tokenizer)
                work.append((prompt, TASKS[task].new_tokens, [Variant(*cell) for cell in cells]))
        with Progress() as progress:
            bar = progress.add_task("peers", total=sum(len(chosen) for *_, chosen in work))
            for found in peers.answers(self.pair, work) if work else ():
                variant, kept = found.variant, {"kept_slots": found.kept}
                self.note(found.prompt, variant.method, variant.budget, found.tokens, found.seconds, **kept)
                progress.advance(bar)


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """As of the quality benchmark, and by task the score over full KV's on the same prompts; None where that is 0."""
    listed = list(records)
    found = by_method(listed)
    full = {(r["task"], r["length"], r["seed"]): r["score"] for r in listed if r["method"] == FULL}
    for entry in found:
        mine = [r for r in listed if all(r[name] == entry[name] for name in ("method", "budget", "length"))]
        entry["tasks_of_full"] = {
            task: _of_full([r for r in mine if r["task"] == task], full) for task in entry["tasks"]
        }
    return found


def _of_full(mine: list[dict[str, Any]], full: dict[tuple[Any, ...], float]) -> float | None:
    theirs = sum(full.get((r["task"], r["length"], r["seed"]), 0.0) for r in mine)
    return round(sum(r["score"] for r in mine) / theirs, 4) if theirs else None


def show(summary: list[dict[str, Any]]) -> None:
    """Each engine's score over full KV's, by budget and task."""
    tasks = list(dict.fromkeys(task for entry in summary for task in entry["tasks"]))
    table = Table("tokens", "budget", "engine", "prompts", "score", "of full KV", *tasks, title="score over full KV's")
    for entry in sorted(summary, key=lambda e: (e["length"], e["budget"] or 0)):
        cells = [entry["retention"], *(entry["tasks_of_full"].get(task) for task in tasks)]
        shares = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        head = [str(entry[name] or "-") for name in ("length", "budget", "method", "prompts")]
        table.add_row(*head, f"{entry['score']:.2f}", *shares)
    Console(width=160).print(table)


def main() -> None:
    given = arguments()
    bench = Bench(given)
    bench.run()
    bench.run_peers()
    bench.store.save()
    show(bench.store.parts["summary"])


if __name__ == "__main__":
    main()
