"""How much a weaker draft costs: the pair's draft with fewer and fewer layers, on prompts of the quality benchmark.

A draft is made weaker by leaving out a block of layers in front of its last one (as arXiv 2403.17887 prunes, without
healing). Each depth answers alone and drafts for SpecKV and SpecPC; full KV and SnapKV, which need no draft, are the
lines that one compares with. Records are written one by one: a rerun goes on where it stopped.

    python -m bench.weak_draft
    python -m bench.weak_draft --layers 16 --methods full specpass_speckv specpass_best --dtype float32 --out FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import common
from specpass import SpecKVPC
from specpass.benchmarks.methods import LOOKAHEAD, WINDOW
from specpass.benchmarks.models import Pair, answers, label
from specpass.benchmarks.pace import Pace
from specpass.benchmarks.quality.summary import summarise
from specpass.benchmarks.quality.variants import DRAFT, FULL, Variant
from specpass.benchmarks.results import Store
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.benchmarks.tasks.table import SEPARATING, TASKS
from specpass.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Filtered(Variant):
    """SpecKV-PC whose target reads 512 tokens: the draft's attention chooses them, whatever it writes."""

    def specpass_method(self) -> Method:
        assert self.budget is not None
        return SpecKVPC.best(self.budget, prompt_budget=512, lookahead=8)


DRAFTLESS = (Variant(FULL, None), Variant("specpass_snapkv", 256))
DRAFTED = (
    Variant(DRAFT, None),
    Variant("specpass_speckv", 256),
    Variant("specpass_specpc", 1024),
    Variant("specpass_best", 256),
    Variant("specpass_bestpc", 1024),
    Filtered("specpass_bestkvpc_512", 256),
)
METHODS = tuple(variant.method for variant in (*DRAFTLESS, *DRAFTED))
KEY = ("draft_layers", "method", "budget", "task", "length", "seed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 22, 20, 16], help="layers that the draft keeps")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=2, help="prompts of each task")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "weak_draft.json")
    return parser.parse_args()


def cut(model: Any, layers: int) -> None:
    """Leave out layers of a decoder, in place, all but the first `layers` - 1 and the last."""
    from torch import nn

    decoder = model.get_decoder()
    if not 2 <= layers <= len(decoder.layers):
        sys.exit(f"--layers {layers}: name at least 2 and at most {len(decoder.layers)}, which the draft has.")
    decoder.layers = nn.ModuleList([*decoder.layers[: layers - 1], decoder.layers[-1]])
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # its place in a KV cache
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]


class Bench:
    """The pair, the prompts and the store."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pair = Pair(args.target, args.draft, args.dtype, lowering=args.lowering)
        settings = {
            "kind": "weak_draft",
            "target": label(args.target),
            "draft": label(args.draft),
            "dtype": args.dtype,
            "window": WINDOW,
            "lookahead": LOOKAHEAD,
        }
        self.store = Store(args.out, settings, KEY, args.restart, summary)
        self.prompts = [
            TASKS[task].prompt(seed, args.tokens, self.pair.tokenizer)
            for seed in range(args.seeds)
            for task in SEPARATING
        ]

    def key(self, layers: int | None, variant: Variant, prompt: Prompt) -> tuple[Any, ...]:
        return layers, variant.method, variant.budget, prompt.task, prompt.length, prompt.seed

    def todo(self) -> Iterator[tuple[int | None, Variant, list[Prompt]]]:
        """What has no record: (layers of the draft, None where there is none; method; prompts)."""
        grid: list[tuple[int | None, Variant]] = [(None, variant) for variant in DRAFTLESS]
        grid += [(layers, variant) for layers in self.args.layers for variant in DRAFTED]
        for layers, variant in grid:
            if variant.method not in self.args.methods:
                continue
            prompts = [prompt for prompt in self.prompts if self.key(layers, variant, prompt) not in self.store]
            if prompts:
                yield layers, variant, prompts

    def run(self) -> None:
        work = list(self.todo())
        pace = Pace(sum(len(prompts) for _, _, prompts in work), float("inf"))
        for layers, variant, prompts in work:
            if layers is not None and self.pair.draft.config.num_hidden_layers != layers:
                del self.pair.loaded[self.args.draft]
                cut(self.pair.draft, layers)
            for answer in answers(self.pair, variant, [(p, TASKS[p.task].new_tokens) for p in prompts], None):
                prompt = answer.prompt
                scored = TASKS[prompt.task].scored(prompt, answer.tokens, self.pair.tokenizer)
                self.store.add({**dict(zip(KEY, self.key(layers, variant, prompt), strict=True)), **scored})
                pace.step(
                    1,
                    f"{layers or 'no'} draft layers, {variant.label} {prompt.task} {prompt.seed}: "
                    f"{scored['score']:.2f}",
                )
        self.store.save()


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the quality benchmark's, for each depth of the draft."""
    listed, found = list(records), []
    full = [record for record in listed if record["method"] == FULL]
    for layers in dict.fromkeys(record["draft_layers"] for record in listed):
        own = [r for r in listed if r["draft_layers"] == layers and r["method"] != FULL]
        entries = summarise([*full, *own])
        found += [{"draft_layers": layers, **e} for e in entries if e["method"] != FULL or layers is None]
    return found


def show(summary: list[dict[str, Any]]) -> None:
    table = Table("draft layers", "method", "budget", "score", "of full KV (95 %)")
    for entry in summary:
        low, high = entry["retention_interval"]
        table.add_row(
            str(entry["draft_layers"] or "-"),
            entry["method"],
            str(entry["budget"] or "-"),
            f"{entry['score']:.2f}",
            f"{entry['retention']:.2f} ({low:.2f}-{high:.2f})",
        )
    Console().print(table)


def main() -> None:
    args = arguments()
    bench = Bench(args)
    bench.run()
    show(bench.store.parts["summary"])
    print(f"wrote {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
