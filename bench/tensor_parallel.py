"""A real model over several processes of a CPU (gloo) beside one process: the same tokens, the same kept positions.

The target is spread by transformers' tp_plan="auto"; the draft, the same model, is whole in each process. float32, so
that what differs is the order of sums over processes. SmolLM2-135M has 3 KV heads: three processes, or another target.

    python -m bench.tensor_parallel
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import common

METHODS = ("specpc", "snapkv", "speckv")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m", help="name or folder")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of specpass.methods.registry")
    parser.add_argument("--tokens", type=int, default=600, help="of the prompt")
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--new", type=int, default=16, help="tokens of the answer")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "tensor_parallel.json")
    parser.add_argument("--rank", type=int, help="set by the script itself, of the processes that it starts")
    parser.add_argument("--folder", type=Path, help="as --rank")
    return parser.parse_args()


@dataclasses.dataclass
class Answer:
    """tokens: the answer's. kept: of each layer and KV head the positions. read: of the prompt (SpecPC)."""

    tokens: list[int]
    kept: list[list[list[int]]]
    read: list[int]
    seconds: float


def answer(model: Any, draft: Any, method: Any, ids: list[int], new: int) -> Answer:
    import torch

    import specpass

    start = time.perf_counter()
    specpass.compile(model, draft=draft if method.needs_draft else None, method=method, lowering="eager")
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=new)
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    specpass.restore(model)
    positions = [layer.positions[0].tolist() for layer in cache.layers]
    read = [] if cache.prompt_positions is None else cache.prompt_positions[0].tolist()
    return Answer(out[0, len(ids) :].tolist(), positions, read, time.perf_counter() - start)


def of_rank(args: argparse.Namespace) -> None:
    """What one process finds of its part, and rank 0 of the whole model, as JSON in the folder."""
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    from specpass.methods.registry import make_method

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    os.environ |= {"RANK": str(args.rank), "LOCAL_RANK": str(args.rank), "WORLD_SIZE": str(args.processes)}
    dist.init_process_group(
        "gloo",
        f"file://{args.folder}/store",
        rank=args.rank,
        world_size=args.processes,
        timeout=datetime.timedelta(minutes=30),
    )
    draft = common.load_model(args.target, "float32")
    parts = transformers.AutoModelForCausalLM.from_pretrained(
        common.model_folder(args.target),
        distributed_config=DistributedConfig(tp_plan="auto", tp_size=args.processes),
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).eval()
    [ids] = common.own_text(common.load_tokenizer(args.target), 1, args.tokens)
    found = {}
    for name in args.methods:
        method = make_method(name, str(args.budget), (), window=32)
        alone = None
        if args.rank == 0:
            alone = dataclasses.asdict(answer(common.twin(draft), draft, method, ids, args.new))
        dist.barrier()
        found[name] = {"alone": alone, "part": dataclasses.asdict(answer(parts, draft, method, ids, args.new))}
        print(f"rank {args.rank}: {name}", flush=True)
    (args.folder / f"{args.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    args = arguments()
    if args.rank is not None:
        of_rank(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.tensor_parallel", *sys.argv[1:], "--folder", folder]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(args.processes)]
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit(f"exit codes {codes}: a process failed")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(args.processes)]
    records = [compared(name, [each[name] for each in found]) for name in args.methods]
    settings = {
        "target": args.target,
        "processes": args.processes,
        "dtype": "float32",
        "prompt": args.tokens,
        "budget": args.budget,
        "new_tokens": args.new,
    }
    common.save_results(args.out, settings, results=records)
    for record in records:
        print(record)
    if not all(record["same_tokens"] and record["same_positions"] for record in records):
        sys.exit("several processes answer otherwise than one")


def compared(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the ranks' tokens are one process's, and their heads' positions, side by side, its heads' too."""
    alone, parts = found[0]["alone"], [each["part"] for each in found]
    together = [
        [head for own in layer for head in own] for layer in zip(*(part["kept"] for part in parts), strict=True)
    ]
    same = [
        sum(a == b for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(together, alone["kept"], strict=True)
    ]
    heads = sum(map(len, alone["kept"]))
    return {
        "method": name,
        "same_tokens": all(part["tokens"] == alone["tokens"] for part in parts),
        "same_positions": together == alone["kept"] and all(part["read"] == alone["read"] for part in parts),
        "heads_with_the_same_positions": f"{sum(same)} of {heads}",
        "tokens": alone["tokens"],
        "seconds_alone": round(alone["seconds"], 1),
        "seconds_together": round(max(part["seconds"] for part in parts), 1),
    }


if __name__ == "__main__":
    main()
