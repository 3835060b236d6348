"""Tokens a second of long answers, with a draft that goes on behind its lookahead and without, by turns.

Prompts are windows of this repository's text and code, which the target goes on writing greedily. Each prompt is
answered by every engine, one after the other. Beside the rates: proposed and taken tokens, and how often the answers
agree (in bfloat16 a call of five tokens and one of one may round a near tie differently). "4, 8 bits": four tokens, of
a draft whose steps read its weights in 8 bits.

    python -m bench.speculation
    python -m bench.speculation --target smollm2-135m --draft smollm2-135m --prompts 1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--tokens", type=int, default=1500, help="prompt length")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--proposed", type=int, nargs="+", default=[2, 4], help="tokens of a proposal")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "speculation.json")
    return parser.parse_args()


def answer(model: Any, ids: list[int], new: int) -> tuple[list[int], float]:
    """Tokens, and tokens a second behind the first."""
    timed = common.answer(model, ids, new, min_new_tokens=new, pad_token_id=0)
    return timed.tokens, (new - 1) / (timed.total_s - timed.first_s)


def main() -> None:
    args = arguments()
    import specpass

    tokenizer = common.load_tokenizer(args.target)
    target, draft = (common.load_model(name) for name in (args.target, args.draft))
    method = specpass.SpecKV(args.budget, lookahead=32)
    engines: dict[str, Any] = {}
    for count, bits in ((0, None), *((count, bits) for count in args.proposed for bits in (None, 8))):
        name = f"{count}, {bits} bits" if bits else str(count)
        engines[name] = specpass.compile(
            common.twin(target), draft=draft, method=method, speculate=count, draft_bits=bits
        )
        answer(engines[name], list(range(100, 100 + args.budget + 100)), 48)
    prompts = common.own_text(tokenizer, args.prompts, args.tokens)
    found: dict[str, list[Any]] = {name: [] for name in engines}
    for ids in track(prompts, "answers"):
        for name, model in engines.items():
            report = specpass.report(model)
            before = report.replayed, report.proposed, report.accepted
            tokens, rate = answer(model, ids, args.new)
            counts = [
                now - then
                for now, then in zip((report.replayed, report.proposed, report.accepted), before, strict=True)
            ]
            found[name].append((tokens, rate, *counts))
    engines_found = {}
    for name, records in found.items():
        ratios = [record[1] / plain[1] for record, plain in zip(records, found["0"], strict=True)]
        engines_found[name] = {
            "tokens_per_second": [round(record[1], 3) for record in records],
            "median": common.median((record[1] for record in records), 3),
            "ratio": common.median(ratios, 3),
            "free": [record[2] for record in records],
            "proposed": sum(record[3] for record in records),
            "accepted": sum(record[4] for record in records),
            "same_answers": sum(record[0] == plain[0] for record, plain in zip(records, found["0"], strict=True)),
        }
    settings = {name: getattr(args, name) for name in ("tokens", "new", "budget", "prompts")}
    settings |= {"target": Path(args.target).name, "draft": Path(args.draft).name, "dtype": "bfloat16"}
    common.save_results(args.out, settings, speculate=engines_found)
    print({count: {k: e[k] for k in ("median", "ratio", "proposed", "accepted")} for count, e in engines_found.items()})


if __name__ == "__main__":
    main()
