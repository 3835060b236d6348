"""Time to the first token of a long prompt: each method against the full prefill of the uncompiled model, in one run.

Full prefills and compiled ones alternate on fresh random prompts, so that a busy machine slows all. Beside the
medians stands the floor: FLOPs of the models' own products over a measured matmul rate. SpecPC: the draft reads the
prompt, the target what is left. SpecKV: both read all; its sparse form is held to the same floor.

    python -m bench.first_token
    python -m bench.first_token --target smollm2-135m --draft smollm2-135m --tokens 2000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--tokens", type=int, default=8192, help="prompt length")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that SpecPC's target reads")
    parser.add_argument("--slots", type=int, default=256, help="that SpecKV keeps")
    parser.add_argument("--columns", type=int, default=2048, help="that SpecKV's sparse prefill reads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "first_token.json")
    return parser.parse_args()


def first_token(model: Any, length: int, seed: int) -> float:
    """Seconds of `generate` for one token after a random prompt."""
    import torch

    ids = torch.randint(100, 20_000, (1, length), generator=torch.Generator().manual_seed(seed))
    since = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    return time.perf_counter() - since


def prefill_flops(model: Any, length: int) -> int:
    """FLOPs of a prefill of `length` tokens with logits of the last one, counted on the meta device.

    An attention site counts as its full S x S products, which is what the model's own formula says; a causal
    kernel may skip half of them.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="sdpa")
        ids = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape(input_ids=ids, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def main() -> None:
    args = arguments()
    import specpass
    from specpass.benchmarks.speed.rates import matmul_rate

    full, draft = (common.load_model(name) for name in (args.target, args.draft))
    methods = {
        "specpc": specpass.SpecPC(budget=args.budget),
        "speckv": specpass.SpecKV(budget=args.slots, lookahead=32),
        "speckv_sparse": specpass.SpecKV(budget=args.slots, lookahead=32, sparse_prefill=args.columns),
    }
    engines = {"full": full}
    for name, method in methods.items():
        engines[name] = specpass.compile(common.twin(full), draft=draft, method=method)
    rate = matmul_rate("cpu", "bfloat16")
    flops = {"full": prefill_flops(full, args.tokens)}
    read = prefill_flops(draft, args.tokens)
    flops["specpc"] = read + prefill_flops(full, args.budget)
    flops["speckv"] = flops["speckv_sparse"] = read + prefill_flops(full, args.tokens + 32)

    compiled = {}
    for name, engine in engines.items():  # graphs serve every longer prompt
        since = time.perf_counter()
        first_token(engine, max(args.budget, 2 * args.columns) + 64, 0)
        compiled[name] = round(time.perf_counter() - since, 2)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for seed in range(args.rounds):
        for name, engine in engines.items():
            seconds[name].append(round(first_token(engine, args.tokens, seed), 3))
            print(name, seconds[name][-1])

    medians = {name: common.median(found, 3) for name, found in seconds.items()}
    settings = {
        "target": Path(args.target).name,
        "draft": Path(args.draft).name,
        "dtype": "bfloat16",
        "tokens": args.tokens,
        "rounds": args.rounds,
        "methods": {name: method.key for name, method in methods.items()},
    }
    common.save_results(
        args.out,
        settings,
        seconds=seconds,
        median_s=medians,
        ratio={name: round(median / medians["full"], 4) for name, median in medians.items()},
        flops=flops,
        flop_ratio={name: round(count / flops["full"], 4) for name, count in flops.items()},
        matmul_flops_per_second=round(rate),
        floor_s={name: round(count / rate, 3) for name, count in flops.items()},
        first_call_s=compiled,
    )


if __name__ == "__main__":
    main()
