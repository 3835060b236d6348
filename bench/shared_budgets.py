"""What budgets that KV heads share cost beside equal ones: first token, decode step and storage, in one process.

Every method compiles a twin of the target over the same weights. In each round one prompt, this repository's own text,
goes through all of them, in an order that turns from round to round, and then single steps do, so that a busy machine
slows all. Beside the medians stand the floors: a prefill's FLOPs over a measured matmul rate, and a step's bytes over
the memory's bandwidth.

    python -m bench.shared_budgets
    python -m bench.shared_budgets --tokens 2048 --dtype float32 --out FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench import common
from bench.first_token import prefill_flops

UNIFORM = "uniform"
SPREADS: dict[str, dict[str, Any]] = {
    UNIFORM: {},
    "heads": {"spread": "heads"},
    "global": {"spread": "global"},
    "global, scores by outputs": {"spread": "global", "reconstruction": True},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--tokens", type=int, default=8192, help="prompt length")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--lookahead", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="decode steps behind each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "shared_budgets.json")
    return parser.parse_args()


def first_token(model: Any, method: Any, ids: list[int], room: int) -> tuple[float, Any]:
    """Seconds from the prompt to its first token's logits, and the cache."""
    import torch

    from specpass import BudgetCache

    cache = BudgetCache(model.config, method, max_new_tokens=room, prompt_length=len(ids))
    return seconds(model, cache, torch.tensor([ids])), cache


def seconds(model: Any, cache: Any, ids: Any) -> float:
    import torch

    since = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - since


def run(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """Records of every method, seconds of each prompt and step and bytes, and the floors."""
    import torch
    from rich.progress import track

    import specpass
    from specpass.observe.storage import cache_bytes

    target, draft = (common.load_model(name, args.dtype) for name in (args.target, args.draft))
    prompts = common.own_text(common.load_tokenizer(args.target), args.rounds + 1, args.tokens)
    # Every step is the graph's: replayed ones cost nothing.
    given = {"budget": args.budget, "lookahead": args.lookahead, "verify": False}
    methods = {name: specpass.SpecKV(**given, **fields) for name, fields in SPREADS.items()}
    models = {
        name: specpass.compile(common.twin(target), draft=draft, method=method, lowering=args.lowering)
        for name, method in methods.items()
    }
    found: dict[str, Any] = {name: {"first_s": [], "step_s": []} for name in methods}
    token, names = torch.tensor([[prompts[0][0]]]), list(methods)
    for turn, ids in enumerate(track(prompts, "prompts")):
        turned = [*names[turn % len(names) :], *names[: turn % len(names)]]
        caches: dict[str, Any] = {}
        for name in turned:
            took, caches[name] = first_token(models[name], methods[name], ids, args.steps)
            found[name]["cache_bytes"] = cache_bytes(caches[name])
            if turn:  # the first compiles
                found[name]["first_s"].append(round(took, 3))
        for _ in range(args.steps):
            for name in turned:
                took = seconds(models[name], caches[name], token)
                if turn:
                    found[name]["step_s"].append(round(took, 5))
    return found, floors(target, draft, args, found[UNIFORM]["cache_bytes"])


def floors(target: Any, draft: Any, args: argparse.Namespace, held: int) -> dict[str, float]:
    """Seconds that FLOPs and bytes alone take: of both prefills, and of a step with the weights and `held` bytes."""
    from specpass.benchmarks.speed.rates import bandwidth, matmul_rate
    from specpass.observe.storage import step_weight_bytes

    flops = prefill_flops(draft, args.tokens) + prefill_flops(target, args.tokens + args.lookahead)
    return {
        "first_s": round(flops / matmul_rate("cpu", args.dtype), 3),
        "step_s": round((step_weight_bytes(target) + held) / bandwidth("cpu"), 5),
    }


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and each over that of equal budgets: of times the median of the ratios, turn by turn."""
    even = found[UNIFORM]
    return {
        name: {
            **{key: common.median(own[key], 5) for key in ("first_s", "step_s")},
            **{
                f"{key} over uniform": common.median(a / b for a, b in zip(own[key], even[key], strict=True))
                for key in ("first_s", "step_s")
            },
            "cache_bytes over uniform": round(own["cache_bytes"] / even["cache_bytes"], 4),
        }
        for name, own in found.items()
    }


def main() -> None:
    args = arguments()
    found, least = run(args)
    names = ("tokens", "budget", "lookahead", "steps", "rounds", "dtype", "lowering")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"target": Path(args.target).name, "draft": Path(args.draft).name}
    summary = summarise(found)
    for name, entry in summary.items():
        print(name, entry)
    common.save_results(args.out, settings, summary=summary, floors=least, results=found)


if __name__ == "__main__":
    main()
