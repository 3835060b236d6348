"""A document read once: the first token of a second question, against reading document and question anew, in one run.

Both alternate, so that a busy machine slows both. Beside the times stand the share of a prefill's rows that a question
has, the bytes of the prefix and of its file, the time to load it, and what that adds to the process's memory.

    python -m bench.prefix
    python -m bench.prefix --target smollm2-135m --draft smollm2-135m --tokens 2000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--tokens", type=int, default=8192, help="of the document")
    parser.add_argument("--question", type=int, default=64, help="tokens of each question")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "prefix.json")
    return parser.parse_args()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    since = time.perf_counter()
    found = run()
    return time.perf_counter() - since, found


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    args = arguments()
    import torch

    import specpass

    tokenizer = common.load_tokenizer(args.target)
    target = common.load_model(args.target, args.dtype)
    draft = target if args.draft == args.target else common.load_model(args.draft, args.dtype)
    method = specpass.SpecKV(budget=args.budget, lookahead=args.lookahead)
    model: Any = specpass.compile(target, draft=draft, method=method, lowering=args.lowering)
    text = common.own_text(tokenizer, 1, args.tokens + (args.rounds + 1) * args.question)[0]
    document, rest = text[: args.tokens], text[args.tokens :]
    questions = [rest[start : start + args.question] for start in range(0, len(rest), args.question)]

    def first(ids: list[int], **options: Any) -> Any:
        prompt = torch.tensor([ids])
        given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        out = model.generate(
            **given, max_new_tokens=1, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options
        )
        return out.sequences[0, -1].item(), out.past_key_values

    read_s, prefix = timed(lambda: specpass.read(model, document))
    first(questions[0], prefix=prefix)  # both compile
    first(document + questions[0])
    rounds = []
    for question in questions[1:]:
        anew_s, anew = timed(lambda ids=document + question: first(ids))
        behind_s, behind = timed(lambda ids=question: first(ids, prefix=prefix))
        alike = [
            (a.positions[..., :, None] == b.positions[..., None, :]).any(-1).float().mean().item()
            for a, b in zip(anew[1].budgeted, behind[1].budgeted, strict=True)
        ]
        kept = round(sum(alike) / len(alike), 4)
        rounds.append({"anew_s": anew_s, "behind_s": behind_s, "same_token": anew[0] == behind[0], "same_kept": kept})
        print(rounds[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "doc.prefix"
        save_s, _ = timed(lambda: prefix.save(file))
        size = file.stat().st_size
        nbytes = prefix.nbytes
        before = resident()
        load_s, loaded = timed(lambda: specpass.Prefix.load(file))
        mapped = resident() - before
        from_file_s, _ = timed(lambda: first(questions[1], prefix=loaded))
    anew, behind = (common.median(each[name] for each in rounds) for name in ("anew_s", "behind_s"))
    share = (args.question + args.lookahead) / (args.tokens + args.question + args.lookahead)
    summary = {
        "first_token_anew_s": anew,
        "first_token_behind_s": behind,
        "ratio": round(behind / anew, 4),
        "share_of_rows": round(share, 4),
        "first_token_from_file_s": round(from_file_s, 4),
        "read_s": round(read_s, 3),
        "save_s": round(save_s, 3),
        "load_s": round(load_s, 4),
        "prefix_bytes": nbytes,
        "file_bytes": size,
        "resident_after_load_bytes": mapped,
    }
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    common.save_results(args.out, settings, summary=summary, rounds=rounds)
    print(summary)


if __name__ == "__main__":
    main()
