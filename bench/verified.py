"""Are the tokens that come free full KV's own? The lookahead's tokens that an answer took, against the plain target.

Each prompt is answered greedily in float32 until the first token that is not the lookahead's. The plain target then
reads prompt and answer once: where its best token at each position is the answer's next one, the answer is full KV's
greedy, token for token. Kept beside: how far the first token that differs lay ahead, and the least distance between
the best and the second-best logit, which says how near a tie was.

    python -m bench.verified
    python -m bench.verified --pairs smollm2-135m/smollm2-135m --prompts 8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common

PAIRS = ("smollm2-135m/smollm2-135m", "qwen2.5-coder-1.5b/qwen2.5-coder-0.5b")
LOOKAHEAD = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="target/draft, names or folders")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=384, help="prompt length")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "verified.json")
    return parser.parse_args()


def answer(model: Any, ids: list[int]) -> tuple[list[int], int]:
    """(tokens that came free or were the first, how many came free) of an answer that ends where it leaves."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    import specpass

    report = specpass.report(model)
    before, steps = report.replayed, 0

    class Left(StoppingCriteria):
        """Stop at the first step that a graph computed."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            left = report.replayed - before < steps - 1
            return torch.full((input_ids.shape[0],), left, dtype=torch.bool)

    prompt = torch.tensor([ids])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LOOKAHEAD + 1,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Left()]),
    )
    free = report.replayed - before
    return out[0, len(ids) :].tolist()[: free + 1], free


def one(model: Any, plain: Any, ids: list[int]) -> dict[str, Any]:
    """One prompt's answer beside the plain target's best tokens."""
    import torch

    tokens, free = answer(model, ids)
    with torch.no_grad():
        logits = plain(torch.tensor([ids + tokens[:-1]]), logits_to_keep=len(tokens)).logits[0]
    best = logits.topk(2).values
    return {
        "free": free,
        "equal": logits.argmax(1).tolist() == tokens,
        "least_margin": round(float((best[:, 0] - best[:, 1]).min()), 6),
    }


def main() -> None:
    args = arguments()
    import specpass

    found: dict[str, Any] = {}
    for pair in args.pairs:
        names = pair.rsplit("/", 1) if not Path(pair).exists() else [pair, pair]
        tokenizer = common.load_tokenizer(names[0])
        target, draft = (common.load_model(name, "float32") for name in names)
        model = common.twin(target)
        specpass.compile(model, draft=draft, method=specpass.SpecKV(args.budget, lookahead=LOOKAHEAD))
        own = [one(model, target, ids) for ids in track(common.own_text(tokenizer, args.prompts, args.tokens), pair)]
        found[pair] = {
            "prompts": len(own),
            "equal": sum(each["equal"] for each in own),
            "free_tokens": sum(each["free"] for each in own),
            "records": own,
        }
        print(pair, {name: value for name, value in found[pair].items() if name != "records"})
    settings = {name: getattr(args, name) for name in ("prompts", "tokens", "budget")}
    common.save_results(args.out, {**settings, "lookahead": LOOKAHEAD, "dtype": "float32"}, pairs=found)


if __name__ == "__main__":
    main()
