"""Lookups where every line is a needle: how much of the full-KV answer each method keeps at a small budget.

`--stage eager` runs the plain formulas of specpass/testing/eager.py, `--stage compiled` runs specpass through
`model.generate`, and each compiled answer is set beside its eager one: same tokens or not, share of the kept
slots that both chose, and how far the compiled choice is from a top-k of the eager scores. In bfloat16 the
two differ by rounding, which may flip slots of nearly equal score. Records are written one by one: a rerun
goes on where it stopped.

    python -m bench.multikey --stage all
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import common, needles

METHODS = ("full", "draft", "streaming", "snapkv", "speckv", "oracle")
SCORED = ("snapkv", "speckv", "oracle")
PRUNED = ("streaming", *SCORED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=("eager", "compiled", "all"), default="all")
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--kind", choices=needles.KINDS, default="multikey")
    parser.add_argument("--tokens", type=int, default=1700)
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=16, help="seeds 0 .. N-1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--restart", action="store_true", help="drop stored records")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "multikey.json")
    return parser.parse_args()


class Bench:
    """The pair, the prompts and the store; one method per stage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = {k: getattr(args, k) for k in ("kind", "tokens", "budget", "window", "lookahead", "new_tokens")}
        settings |= {"target": Path(args.target).name, "draft": Path(args.draft).name, "dtype": "bfloat16"}
        self.store = common.Store(args.out, settings, args.restart, summarise)
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.scratch = Path(tempfile.gettempdir()) / "specpass-bench" / f"multikey-{key}"
        if args.restart:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self.latest: tuple[int, Any] | None = None
        self.drafted: dict[int, list[int]] = {}
        self.tokenizer = common.load_tokenizer(args.target)
        self.target, self.draft = common.load_model(args.target), common.load_model(args.draft)
        self.pad = self.tokenizer.pad_token_id or 0
        self.vocab = min(self.target.config.vocab_size, self.draft.config.vocab_size)
        self.prompts = [needles.make_prompt(args.kind, seed, args.tokens, self.tokenizer) for seed in range(args.seeds)]

    def ids(self, prompt: needles.Prompt) -> Any:
        """Prompt ids, LongTensor [1, S]."""
        import torch

        return torch.tensor([prompt.ids])

    def missing(self, engine: str, methods: Iterable[str]) -> list[tuple[str, needles.Prompt]]:
        """(method, prompt) pairs without a record, prompt by prompt."""
        asked = {*self.args.methods} | ({"full"} if "oracle" in self.args.methods else set())  # its lookahead
        wanted = [method for method in METHODS if method in methods and method in asked]
        return [(m, p) for p in self.prompts for m in wanted if (f"{m}/{engine}", p.seed) not in self.store]

    def record(self, method: str, prompt: needles.Prompt, tokens: list[int], since: float, **more: Any) -> None:
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.store.put(
            method,
            prompt.seed,
            prompt_tokens=len(prompt.ids),
            expected=list(prompt.answers),
            answer=answer,
            score=needles.score(answer, prompt.answers),
            tokens=tokens,
            seconds=round(time.perf_counter() - since, 2),
            **more,
        )

    # -- eager

    def start(self, prompt: needles.Prompt) -> Any:
        """The target's full prefill of the prompt, shared by all methods: on some CPUs it takes a minute."""
        from specpass.testing import eager

        if self.latest is None or self.latest[0] != prompt.seed:
            self.latest = (prompt.seed, eager.prefill(self.target, self.ids(prompt), self.args.window))
        return self.latest[1]

    def selection(self, method: str, prompt: needles.Prompt) -> Any:
        """The eager kept set of a pruning method, kept on disk for the compiled stage."""
        import torch

        from specpass.testing import eager

        saved = self.scratch / f"{method}-{prompt.seed}.pt"
        if saved.exists():
            return eager.Selection(**torch.load(saved))
        budget, window = self.args.budget, self.args.window
        if method == "streaming":
            found = eager.select_streaming(self.target, len(prompt.ids), budget)
        elif method == "snapkv":
            how = eager.Scoring(window=window, reduce="mean", pool="avg")
            found = eager.select_shared(self.start(prompt), budget, how=how)
        else:
            rows = torch.tensor([self.lookahead(method, prompt)])
            found = eager.select_shared(self.start(prompt), budget, rows, eager.Scoring(window=window))
        self.scratch.mkdir(parents=True, exist_ok=True)
        torch.save({"positions": found.positions, "scores": found.scores}, saved)
        return found

    def lookahead(self, method: str, prompt: needles.Prompt) -> list[int] | None:
        """Valid lookahead ids: what the eager run drafted, or the target's own full-KV answer (oracle)."""
        if method == "oracle":
            return self.store["full/eager", prompt.seed]["tokens"]
        if method != "speckv":
            return None
        if (f"{method}/eager", prompt.seed) in self.store:
            return self.store[f"{method}/eager", prompt.seed]["lookahead"]
        if prompt.seed not in self.drafted:
            from specpass.testing import eager

            rows, valid = eager.draft_lookahead(
                self.draft, self.ids(prompt), self.args.lookahead, self.pad, vocab_size=self.vocab
            )
            self.drafted[prompt.seed] = rows[0, :valid].tolist()
        return self.drafted[prompt.seed]

    def run_eager(self) -> None:
        from specpass.testing import eager

        for method, prompt in track(self.missing("eager", METHODS), "eager"):
            since, ids, more = time.perf_counter(), self.ids(prompt), {}
            if method == "draft":
                tokens = eager.generate_full(self.draft, ids, self.args.new_tokens).tokens
            else:
                kept = None if method == "full" else self.selection(method, prompt).positions
                lookahead = self.lookahead(method, prompt)
                more = {} if lookahead is None else {"lookahead": lookahead}
                tokens = eager.generate(self.target, ids, kept, self.args.new_tokens, start=self.start(prompt)).tokens
            self.record(f"{method}/eager", prompt, tokens, since, **more)

    # -- compiled

    def specpass_method(self, method: str) -> Any:
        import specpass

        budget, window = self.args.budget, self.args.window
        if method == "streaming":
            return specpass.StreamingLLM(budget=budget)
        if method == "snapkv":
            return specpass.SnapKV(budget=budget, window=window)
        # What the kept slots are worth: full KV's own logits would answer in their place.
        return specpass.SpecKV(budget=budget, window=window, lookahead=self.args.lookahead, verify=False)

    def run_compiled(self) -> None:
        import specpass

        todo = self.missing("compiled", PRUNED)
        # eager kept sets first, while the target is still the plain model
        reference = {
            (method, prompt.seed): self.selection(method, prompt) for method, prompt in track(todo, "eager kept sets")
        }
        for name in PRUNED:
            prompts = [prompt for method, prompt in todo if method == name]
            if not prompts:
                continue
            method = self.specpass_method(name)
            model = specpass.compile(self.target, draft=self.draft, method=method, lowering=self.args.lowering)
            try:
                for prompt in track(prompts, f"compiled {name}"):
                    self.compiled_answer(model, name, method, prompt, reference[name, prompt.seed])
            finally:
                specpass.restore(model)

    def compiled_answer(self, model: Any, name: str, method: Any, prompt: needles.Prompt, reference: Any) -> None:
        import torch

        import specpass

        since, ids, given = time.perf_counter(), self.ids(prompt), {}
        if name == "oracle":
            answer = self.lookahead(name, prompt) or []
            padded = torch.tensor([answer + [self.pad] * (self.args.lookahead - len(answer))])
            given["past_key_values"] = specpass.BudgetCache(
                model.config, method, max_new_tokens=self.args.new_tokens, lookahead_ids=padded
            )
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.args.new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=self.pad,
            return_dict_in_generate=True,
            **given,
        )
        tokens, cache = out.sequences[0, ids.shape[1] :].tolist(), out.past_key_values
        eager = self.store[f"{name}/eager", prompt.seed]
        more: dict[str, Any] = {"agrees": tokens == eager["tokens"]}
        if name == "speckv":
            drafted = cache.lookahead_ids[0, : len(eager["lookahead"])].tolist()
            more["lookahead_agrees"] = drafted == eager["lookahead"]
        kept = [layer.positions[0] for layer in cache.layers]
        more |= compare(kept, reference, self.args.window)
        self.record(f"{name}/compiled", prompt, tokens, since, **more)


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per method: prompts, mean scores of both engines, answers that agree, mean overlap of kept sets."""
    listed, found = list(records), {}
    for method in METHODS:
        entry: dict[str, Any] = {}
        for engine in ("eager", "compiled"):
            own = [record for record in listed if record["method"] == f"{method}/{engine}"]
            if own:
                entry |= {f"{engine}_prompts": len(own), engine: _mean(record["score"] for record in own)}
        if "compiled" in entry:
            entry["agree"] = sum(record["agrees"] for record in own)
            entry["overlap"] = _mean(_mean(record["overlap"]) for record in own)
        found[method] = entry
    return found


def compare(kept: list[Any], reference: Any, window: int) -> dict[str, Any]:
    """Kept sets [K, C] per layer against the eager selection.

    Returns:
        overlap: per layer, the share of slots that both kept, the window left out where slots are scored.
        margin: smallest kept minus largest dropped eager score, least of all layers; >= 0 is a true top-k.
    """
    import torch

    from specpass.testing import eager

    overlap = []
    for ours, theirs in zip(kept, reference.positions, strict=True):
        free = theirs.shape[1] - (window if reference.scores else 0)
        same = [torch.isin(a[:free], b[:free]).float().mean() for a, b in zip(ours, theirs, strict=True)]
        overlap.append(round(float(torch.stack(same).mean()), 4))
    pairs = zip(reference.scores, kept, strict=bool(reference.scores))
    margins = [eager.score_margin(scores, ours, window) for scores, ours in pairs]
    return {"overlap": overlap} | ({"margin": min(margins)} if margins else {})


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 4)


def show(summary: dict[str, dict[str, Any]]) -> None:
    table = Table("method", "eager", "compiled", "answers agree", "kept-set overlap", title="share answered right")
    for method, entry in summary.items():
        agree = f"{entry['agree']} of {entry['compiled_prompts']}" if "agree" in entry else "-"
        figures = [f"{entry[key]:.3f}" if key in entry else "-" for key in ("eager", "compiled", "overlap")]
        table.add_row(method, figures[0], figures[1], agree, figures[2])
    Console().print(table)


def main() -> None:
    args = arguments()
    bench = Bench(args)
    if args.stage in ("eager", "all"):
        bench.run_eager()
    if args.stage in ("compiled", "all"):
        bench.run_compiled()
    bench.store.save()
    show(bench.store.parts["summary"])
    print(f"wrote {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
