"""Perplexity of a long answer whose own tokens are bounded (generated=M), over full KV's, on real text.

A prompt of this repository's own text is pruned to C slots of each KV head; the text behind it is then fed token by
token (teacher forcing), so that every policy is asked for the same tokens. Kept beside: the most slots a head had in
use, bytes of the cache as it filled and at the end, and the number of decode graphs. Policies are those of `evict=`;
with "/shared" behind it one shares the budget of prompt and answer (share_budget), and "grows" bounds nothing;
"lookahead" needs a draft, whose own keys and values are counted apart. The file is written after each of them, and a
rerun goes on from it.

    python -m bench.bounded --out smollm2.json
    python -m bench.bounded --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b  # the committed file, which goes on
    python -m bench.bounded --new 600 --budget 64 --generated 64 --policies recent attention rkv rkv/shared
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import common
from specpass.benchmarks.results import Store

CHUNK = 256  # tokens of full KV's at once: logits of all of them would take gigabytes


def arguments() -> argparse.Namespace:
    from specpass.cache.worth import FORESEEING, POLICIES

    names = [*POLICIES, *(f"{policy}/shared" for policy in POLICIES), "grows"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--draft", help="name or folder: SpecKV prunes the prompt; left out: SnapKV")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=4000, help="tokens behind it")
    parser.add_argument("--budget", type=int, default=256, help="C")
    parser.add_argument("--generated", type=int, default=512, help="M")
    parser.add_argument("--policies", nargs="+", choices=names, metavar="POLICY", help=", ".join(names))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "bounded.json", help="file to go on from")
    parser.add_argument("--restart", action="store_true", help="forget what the file holds")
    given = parser.parse_args()
    given.policies = given.policies or [name for name in names if given.draft or not name.startswith(FORESEEING)]
    return given


def fed(model: Any, cache: Any, ids: Any, prompt: int, label: str) -> dict[str, Any]:
    """Feed ids [1, T] behind the first `prompt` of them one by one."""
    import torch

    from specpass.cache.drafting import DRAFTS
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
    draft = {"draft_bytes": sum(states.nbytes for states in DRAFTS[cache].caches)} if cache in DRAFTS else {}
    return draft | {
        "policy": label,
        "loss": loss / len(steps),
        "perplexity": math.exp(loss / len(steps)),
        "most_slots": slots,
        "bytes_when_full": sizes[len(sizes) // 3],
        "bytes_at_end": sizes[-1],
        "seconds": round(time.perf_counter() - since, 1),
    }


def full(model: Any, ids: Any, prompt: int) -> dict[str, Any]:
    """The same with full KV, a few hundred tokens at a time."""
    import torch
    from transformers import DynamicCache

    cache, loss = DynamicCache(config=model.config), 0.0
    with torch.no_grad():
        model(input_ids=ids[:, : prompt - 1], past_key_values=cache, logits_to_keep=1)
        for start in track(range(prompt - 1, ids.shape[1] - 1, CHUNK), description="full KV"):
            stop = min(start + CHUNK, ids.shape[1] - 1)
            logits = model(input_ids=ids[:, start:stop], past_key_values=cache).logits[0].float()
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum"))
    loss /= ids.shape[1] - prompt
    return {"policy": "full KV", "loss": loss, "perplexity": math.exp(loss)}


def ratios(records: Any) -> dict[str, float]:
    """Of each policy, its perplexity over full KV's."""
    found = {record["policy"]: record["perplexity"] for record in records}
    whole = found.pop("full KV")
    return {policy: round(own / whole, 4) for policy, own in found.items()}


def bound_of(policy: str, slots: int) -> dict[str, Any]:
    """BudgetCache's arguments."""
    if policy == "grows":
        return {}
    name, _, shared = policy.partition("/")
    return {"generated": slots, "evict": name, "share_budget": bool(shared)}


def main() -> None:
    given = arguments()
    import torch

    import specpass

    model, tokenizer = common.load_model(given.target, given.dtype), common.load_tokenizer(given.target)
    ids = torch.tensor(common.own_text(tokenizer, 1, given.prompt + given.new))
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "restart", "policies")}
    settings["text"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]  # it is the repository's, and changes
    store = Store(given.out, settings, ("policy",), given.restart, ratios)
    if ("full KV",) not in store:
        store.add(full(model, ids, given.prompt))
    draft = None if given.draft is None else common.load_model(given.draft, given.dtype)
    method = (
        specpass.SnapKV(budget=given.budget) if draft is None else specpass.SpecKV(budget=given.budget, lookahead=32)
    )
    specpass.compile(model, draft=draft, method=method, lowering=given.lowering)
    for policy in given.policies:
        if (policy,) in store:
            continue
        graphs = decode_graphs(model)
        bound = bound_of(policy, given.generated)
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=given.new, **bound)
        run = fed(model, cache, ids, given.prompt, policy)
        store.add(run | {"more_decode_graphs": decode_graphs(model) - graphs})
        print(f"{policy}: perplexity {run['perplexity']:.3f}, over full KV's {store.parts['summary'][policy]}")


def decode_graphs(model: Any) -> int:
    """Graphs of a step that are there so far."""
    import specpass

    return sum(graph.kind == "decode" for graph in specpass.report(model).graphs)


if __name__ == "__main__":
    main()
