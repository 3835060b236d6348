"""Several answers of one prompt: bytes of the cache and seconds a step, with the prompt's slots shared and copied.

A prompt of this repository's own text is pruned to C slots of each KV head. Shared: it is read once, and n sequences
go on from it (`cache.batch_repeat_interleave(n)`, which is what generate() does for num_return_sequences=n). Copied:
it is read n times, as rows of a batch. Both are fed the same tokens, and their logits are compared.

    python -m bench.many_answers
    python -m bench.many_answers --target qwen2.5-coder-0.5b --answers 1 8
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench import common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=512, help="C")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 4, 8], help="n")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer, of which the first half warms up")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "many_answers.json")
    return parser.parse_args()


def answered(model: Any, cache: Any, ids: Any, count: int, shared: bool, fed: Any) -> tuple[dict[str, Any], Any]:
    """What `count` answers of ids [1, S] take, fed tokens [count, m]; the logits behind the last of them."""
    import torch

    from specpass.observe.storage import cache_bytes

    with torch.inference_mode():
        since = time.perf_counter()
        model(input_ids=ids if shared else ids.expand(count, -1), past_key_values=cache, logits_to_keep=1)
        if shared:
            cache.batch_repeat_interleave(count)
        read = time.perf_counter() - since
        steps = []
        for token in fed.split(1, 1):
            since = time.perf_counter()
            out = model(input_ids=token.contiguous(), past_key_values=cache, logits_to_keep=1)
            steps.append(time.perf_counter() - since)
    size = cache_bytes(cache)
    half = steps[len(steps) // 2 :]
    return {"answers": count, "shared": shared, "bytes": size, "read_s": read, "step_s": common.median(half, 5)}, out


def main() -> None:
    given = arguments()
    import torch

    import specpass

    model, tokenizer = common.load_model(given.target, given.dtype), common.load_tokenizer(given.target)
    method = specpass.SnapKV(budget=given.budget)
    specpass.compile(model, method=method, lowering=given.lowering)
    ids = torch.tensor(common.own_text(tokenizer, 1, given.prompt))
    dice = torch.Generator().manual_seed(0)
    runs = []
    for count in given.answers:
        fed = torch.randint(1, 1000, (count, given.new), generator=dice)
        logits = []
        for shared in (True, False) if count > 1 else (False,):
            for _ in range(2):  # the first compiles
                cache = specpass.BudgetCache(model.config, method, given.new)
                run, out = answered(model, cache, ids, count, shared, fed)
            runs.append(run)
            logits.append(out.logits.float())
            print(run, flush=True)
        if count > 1:
            runs[-1]["logits_differ"] = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    common.save_results(given.out, settings, runs=runs)


if __name__ == "__main__":
    main()
