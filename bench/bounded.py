"""Perplexity of a long answer whose own tokens are bounded (generated=M), over full KV's, on real text.

A prompt of this repository's own text is pruned to C slots of each KV head; the text behind it is then fed token by
token (teacher forcing), so that every policy is asked for the same tokens. Kept beside: the most slots a head had in
use, bytes of the cache as it filled and at the end, and the number of decode graphs.

    python -m bench.bounded
    python -m bench.bounded --new 1000 --budget 256 --generated 512
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=4000, help="tokens behind it")
    parser.add_argument("--budget", type=int, default=256, help="C")
    parser.add_argument("--generated", type=int, default=512, help="M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "bounded.json")
    return parser.parse_args()


def fed(model: Any, cache: Any, ids: Any, prompt: int, label: str) -> dict[str, Any]:
    """Feed ids [1, T] behind the first `prompt` of them one by one."""
    import torch

    from specpass.observe.storage import cache_bytes

    loss, slots, sizes, since = 0.0, 0, [], time.perf_counter()
    steps = range(prompt, ids.shape[1])
    with torch.no_grad():
        out = model(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        for place in track(steps, description=label):
            loss -= float(out.logits[0, -1].float().log_softmax(-1)[ids[0, place]])
            out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, logits_to_keep=1)
            slots = max(slots, int(cache.get_query_offset(0)))
            sizes.append(cache_bytes(cache))
    return {
        "policy": label,
        "loss": loss / len(steps),
        "perplexity": math.exp(loss / len(steps)),
        "most_slots": slots,
        "bytes_when_full": sizes[len(sizes) // 3],
        "bytes_at_end": sizes[-1],
        "seconds": round(time.perf_counter() - since, 1),
    }


def full(model: Any, ids: Any, prompt: int) -> dict[str, Any]:
    """The same with full KV, in one call."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].float()
    loss = float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:]))
    return {"policy": "full KV", "loss": loss, "perplexity": math.exp(loss)}


def main() -> None:
    given = arguments()
    import torch

    import specpass
    from specpass.cache.evict import POLICIES

    model, tokenizer = common.load_model(given.target, given.dtype), common.load_tokenizer(given.target)
    ids = torch.tensor(common.own_text(tokenizer, 1, given.prompt + given.new))
    runs = [full(model, ids, given.prompt)]
    method = specpass.SnapKV(budget=given.budget)
    specpass.compile(model, method=method, lowering=given.lowering)
    for policy in (*POLICIES, "grows"):
        bound = {} if policy == "grows" else {"generated": given.generated, "evict": policy}
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=given.new, **bound)
        runs.append(fed(model, cache, ids, given.prompt, policy))
        runs[-1]["ratio"] = runs[-1]["perplexity"] / runs[0]["perplexity"]
        runs[-1]["decode_graphs"] = sum(graph.kind == "decode" for graph in specpass.report(model).graphs)
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        common.save_results(given.out, settings, runs=runs)


if __name__ == "__main__":
    main()
