"""Lookups after the prompt itself was shortened: how often SpecPC and SpecKV-PC still find the answer.

Prompts of about 3,000 tokens, kinds "single", "multikey" and "multiquery" of bench.needles; the Qwen pair, compiled.
Records are written one by one: a rerun goes on where it stopped. `--float32 N` sets the tokens that the
compiled SpecPC reads beside those of the eager formulas (specpass.testing.prompt) in float32, for the first N seeds.

    python -m bench.prompt_compression --methods specpc-512 specpc-1024 speckvpc-1024-128
    python -m bench.prompt_compression --methods specpc-512 best-512 --kinds multiquery --dtype float32 --out FILE
    python -m bench.prompt_compression --float32 2 --tokens 1500
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import common, needles
from specpass import SpecKVPC, SpecPC

METHODS = {
    "specpc-512": SpecPC(budget=512),
    "specpc-1024": SpecPC(budget=1024),
    "speckvpc-1024-128": SpecKVPC(budget=128, lookahead=32, prompt_budget=1024),
    "best-512": SpecPC.best(512),
    "best-1024": SpecPC.best(1024),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--kinds", nargs="+", choices=needles.KINDS, default=needles.KINDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=16, help="seeds 0 .. N-1")
    parser.add_argument("--float32", type=int, default=0, metavar="N", help="compare selections in float32 instead")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def prompts(args: argparse.Namespace, tokenizer: Any) -> Iterator[needles.Prompt]:
    for seed in range(args.seeds):  # by seed, so that a run cut short has all kinds
        for kind in args.kinds:
            yield needles.make_prompt(kind, seed, args.tokens, tokenizer)


def generate(model: Any, prompt: needles.Prompt, new_tokens: int, pad: int) -> tuple[list[int], Any]:
    import torch

    ids = torch.tensor([prompt.ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=pad,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), out.past_key_values


def summarise(records: Iterable[dict[str, Any]], kinds: list[str]) -> dict[str, Any]:
    """Mean score by method and kind, with the number of prompts."""
    listed, found = list(records), dict[str, Any]()
    for name in METHODS:
        for kind in kinds:
            scores = [record["score"] for record in listed if record["method"] == f"{name}/{kind}"]
            if scores:
                entry = {"prompts": len(scores), "score": round(statistics.mean(scores), 4)}
                found.setdefault(name, {})[kind] = entry
    return found


def run(args: argparse.Namespace) -> None:
    import specpass

    settings = {
        "tokens": args.tokens,
        "new_tokens": args.new_tokens,
        "dtype": args.dtype,
        "lowering": args.lowering,
        "target": Path(args.target).name,
        "draft": Path(args.draft).name,
        "methods": {name: METHODS[name].key for name in args.methods},
    }
    store = common.Store(
        args.out or common.RESULTS / "prompt_compression.json",
        settings,
        args.restart,
        partial(summarise, kinds=args.kinds),
    )
    tokenizer = common.load_tokenizer(args.target)
    target, draft = (common.load_model(name, args.dtype) for name in (args.target, args.draft))
    work = list(prompts(args, tokenizer))
    for name in args.methods:
        method = METHODS[name]
        missing = [prompt for prompt in work if (f"{name}/{prompt.kind}", prompt.seed) not in store]
        if not missing:
            continue
        model = specpass.compile(target, draft=draft, method=method, lowering=args.lowering)
        for prompt in track(missing, name):
            since = time.perf_counter()
            tokens, cache = generate(model, prompt, args.new_tokens, tokenizer.pad_token_id or 0)
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
            read = int((cache.prompt_positions >= 0).sum())
            store.put(
                f"{name}/{prompt.kind}",
                prompt.seed,
                prompt_tokens=len(prompt.ids),
                tokens_read=read,
                expected=list(prompt.answers),
                answer=answer,
                score=needles.score(answer, prompt.answers),
                seconds=round(time.perf_counter() - since, 2),
            )
        specpass.restore(target)
    store.save()
    table = Table("method", *args.kinds, title="share answered right (prompts)")
    for name, entry in store.parts["summary"].items():
        table.add_row(
            name, *(f"{entry[k]['score']:.3f} ({entry[k]['prompts']})" if k in entry else "-" for k in args.kinds)
        )
    Console().print(table)
    print(f"wrote {os.path.relpath(store.path)}")


def compare(args: argparse.Namespace) -> None:
    """The tokens read, compiled and eager, in float32."""
    import torch

    import specpass
    from specpass.testing import prompt as eager

    tokenizer = common.load_tokenizer(args.target)
    target, draft = common.load_model(args.target, "float32"), common.load_model(args.draft, "float32")
    how = eager.PromptScoring()
    method = specpass.SpecPC(budget=512, **dataclasses.asdict(how))
    model = specpass.compile(target, draft=draft, method=method)
    rows = []
    args.seeds = args.float32
    for prompt in track(list(prompts(args, tokenizer)), "float32"):
        cache = specpass.BudgetCache(target.config, method, max_new_tokens=1)
        ids = torch.tensor([prompt.ids])
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        scores = eager.pooled(eager.prompt_scores(draft, ids, how), how)
        expected = eager.choose(scores, 512, how)
        ours = cache.prompt_positions[0].tolist()
        rows.append(
            {
                "kind": prompt.kind,
                "seed": prompt.seed,
                "prompt_tokens": len(prompt.ids),
                "equal": ours == expected,
                "differing_tokens": len(set(ours) ^ set(expected)),
            }
        )
        print(rows[-1])
    common.save_results(
        args.out or common.RESULTS / "prompt_selection_float32.json",
        {"method": method.key, "tokens": args.tokens},
        results=rows,
    )


def main() -> None:
    args = arguments()
    compare(args) if args.float32 else run(args)


if __name__ == "__main__":
    main()
