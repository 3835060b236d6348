"""Exports in ONNX Runtime against PyTorch and against the exact export: answers, decode steps, bytes, sizes, times.

Parts run one after the other, each in a process of its own (so that one's memory is not another's), and each is
written when it is done: a run that is cut off goes on. A pair in float32 needs disk for two exports (the exact one has
its own target weights) and memory for target and draft.

    python -m bench.onnx_runtime
    python -m bench.onnx_runtime --target smollm2-135m --draft smollm2-135m --out /tmp/onnx_small.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import common

PARTS = ("loop", "export", "export_exact", "torch", "onnx", "decode")
LOOP_LAYERS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1500, help="of each prompt whose answer is compared")
    parser.add_argument("--new", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4000, 8000], help="prompts before timed steps")
    parser.add_argument("--steps", type=int, default=12, help="timed steps after each prompt")
    parser.add_argument("--part", choices=PARTS, help="run one part alone")
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the exports go; default: specpass's cache folder")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "onnx.json")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("target", "draft", "budget", "window", "lookahead", "prompts", "tokens", "new", "lengths", "steps")
    return {name: getattr(args, name) for name in names} | {"dtype": "float32"}


def read(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that are done."""
    if not args.out.exists():
        return {}
    document = json.loads(args.out.read_text())
    if document["settings"] != settings(args):
        raise SystemExit(f"{args.out} holds results of other settings: {document['settings']}; pass --restart.")
    return {name: document[name] for name in (*PARTS, "summary") if name in document}


def folder_of(args: argparse.Namespace, kind: str) -> Path:
    from specpass.files import cache_dir

    root: Path = args.folder or cache_dir() / "bench-onnx"
    return root / f"{Path(args.target).name}-{kind}"


def method_of(args: argparse.Namespace) -> Any:
    import specpass

    return specpass.SpecKV(budget=args.budget, window=args.window, lookahead=args.lookahead)


def prompts(args: argparse.Namespace) -> list[list[int]]:
    from bench import needles

    tokenizer = common.load_tokenizer(args.target)
    return [needles.make_prompt("multikey", seed, args.tokens, tokenizer).ids for seed in range(args.prompts)]


def models(args: argparse.Namespace, draft: bool) -> tuple[Any, Any]:
    target = common.load_model(args.target, "float32")
    if not draft:
        return target, None
    return target, target if args.draft == args.target else common.load_model(args.draft, "float32")


def model_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def run_export(args: argparse.Namespace, exact: bool = False) -> dict[str, Any]:
    """Seconds and bytes of an export; the weights' bytes in the models themselves beside them."""
    import specpass

    target, draft = models(args, not exact)
    out = folder_of(args, "exact" if exact else "speckv")
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    specpass.export_onnx(target, draft, None if exact else method_of(args), out)
    seconds = time.perf_counter() - start
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    own = model_bytes(target) + (0 if draft is None else model_bytes(draft))
    return {
        "seconds": round(seconds, 1),
        "files": files,
        "models_bytes": own,
        "disk_over_models": round(sum(files.values()) / own, 4),
        "peak_gib": peak(),
    }


def run_loop(args: argparse.Namespace) -> dict[str, Any]:
    """The draft's steps as an ONNX Loop and as copies: bytes of prefill.onnx without weights, times to make and to run.

    Random models of the draft's sizes with 4 layers, both as target and as draft.
    """
    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from specpass.export.api import write_graphs

    config = AutoConfig.from_pretrained(common.model_folder(args.draft))
    config.num_hidden_layers = LOOP_LAYERS
    config.layer_types = config.layer_types[:LOOP_LAYERS]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    ids = np.random.default_rng(0).integers(100, 20_000, (1, args.tokens))
    found: dict[str, Any] = {"layers": LOOP_LAYERS, "lookahead": args.lookahead}
    for kind in ("loop", "unrolled"):
        out = folder_of(args, kind)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        start = time.perf_counter()
        write_graphs(out, model, model, method_of(args), unrolled=kind == "unrolled")
        made = time.perf_counter() - start
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(str(out / "prefill.onnx"))
        loaded = time.perf_counter() - start
        times = []
        for _ in range(4):
            start = time.perf_counter()
            session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            times.append(time.perf_counter() - start)
        found[kind] = {
            "graph_bytes": (out / "prefill.onnx").stat().st_size,
            "export_seconds": round(made, 1),
            "load_seconds": round(loaded, 2),
            "prefill_seconds": common.median(times[1:]),
        }
        print(kind, found[kind], flush=True)
        shutil.rmtree(out)
    return found


def peak() -> float:
    """Peak resident memory of this process, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    """PyTorch's answers and kept positions: what the exports must give."""
    import torch

    import specpass

    target, draft = models(args, True)
    specpass.compile(target, draft=draft, method=method_of(args), lowering="eager")
    rows = []
    for ids in prompts(args):
        out = target.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=args.new,
            do_sample=False,
            return_dict_in_generate=True,
        )
        cache = out.past_key_values
        rows.append(
            {
                "prompt_tokens": len(ids),
                "tokens": out.sequences[0, len(ids) :].tolist(),
                "lookahead_ids": cache.lookahead_ids[0].tolist(),
                "positions": [[texts(head) for head in layer.positions[0].tolist()] for layer in cache.layers],
            }
        )
        print(f"torch: prompt {len(rows)} of {args.prompts}", flush=True)
    return {"answers": rows, "peak_gib": peak()}


def texts(positions: list[int]) -> str:
    """One line of the file for a KV head, not one for each number."""
    return " ".join(map(str, positions))


def run_onnx(args: argparse.Namespace) -> dict[str, Any]:
    """The export's answers beside PyTorch's. A position that differs is counted, not excused."""
    from specpass import runtime

    expected = read(args)["torch"]["answers"]
    start = time.perf_counter()
    model = runtime.load(folder_of(args, "speckv"))
    loaded = time.perf_counter() - start
    rows = []
    for ids, theirs in zip(prompts(args), expected, strict=True):
        start = time.perf_counter()
        tokens = model.generate([ids], max_new_tokens=args.new)[0]
        seconds = time.perf_counter() - start
        state: Any = model.state
        pairs = [
            (set(ours), set(map(int, other.split())))
            for layer, layer2 in zip(state.positions, theirs["positions"], strict=True)
            for ours, other in zip(layer[0].tolist(), layer2, strict=True)
        ]
        rows.append(
            {
                "prompt_tokens": len(ids),
                "tokens_equal": tokens == theirs["tokens"],
                "tokens": tokens,
                "lookahead_equal": state.lookahead_ids[0].tolist() == theirs["lookahead_ids"],
                "positions": sum(len(ours) for ours, _ in pairs),
                "positions_unlike": sum(len(ours - other) for ours, other in pairs),
                "seconds": round(seconds, 2),
            }
        )
        print(f"onnx: {rows[-1]['tokens_equal']}, {rows[-1]['positions_unlike']} positions unlike", flush=True)
    return {"load_seconds": round(loaded, 2), "answers": rows, "peak_gib": peak()}


def run_decode(args: argparse.Namespace) -> dict[str, Any]:
    """Steps after long random prompts, pruned and exact in turns; what a step copies."""
    import numpy as np

    from specpass import runtime

    kinds = {kind: runtime.load(folder_of(args, kind)) for kind in ("speckv", "exact")}
    rows = []
    for length in args.lengths:
        ids = np.random.default_rng(length).integers(100, 20_000, length).tolist()
        row: dict[str, Any] = {"prompt_tokens": length}
        states, times = {}, {kind: [] for kind in kinds}
        for kind, model in kinds.items():
            start = time.perf_counter()
            states[kind] = model.prefill([ids], room=64)
            row[f"prefill_seconds_{kind}"] = round(time.perf_counter() - start, 2)
            row[f"cache_bytes_{kind}"] = states[kind].cache_bytes
        for index in range(args.steps + 1):
            for kind, model in kinds.items():
                start = time.perf_counter()
                model.step(states[kind], states[kind].logits.argmax(-1))
                if index:  # the first step touches pages for the first time
                    times[kind].append(1000 * (time.perf_counter() - start))
        row |= {f"step_ms_{kind}": common.median(values) for kind, values in times.items()}
        row["step_time_ratio"] = round(statistics.median(times["speckv"]) / statistics.median(times["exact"]), 4)
        row["cache_bytes_ratio"] = round(row["cache_bytes_speckv"] / row["cache_bytes_exact"], 4)
        row["copied_per_token"] = {kind: copied(model, states[kind]) for kind, model in kinds.items()}
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows, "peak_gib": peak()}


def copied(model: Any, state: Any) -> dict[str, Any]:
    """Bytes that a step moves between the caller and the session, and whether the cache stayed where it was."""
    import numpy as np

    before = {name: value.data_ptr() for name, value in state.storage.items()}
    token = state.logits.argmax(-1)
    model.step(state, token)
    written = sum(heads * (key + value) for heads, key, value in model.bundle.kv) * state.itemsize
    in_place = all(value.data_ptr() == before[name] for name, value in state.storage.items())
    inputs = np.int64().nbytes * (2 * len(token) + state.lengths.size)
    return {
        "cache_in_place": in_place,
        "new_slots_bytes": written,
        "inputs_bytes": inputs,
        "logits_bytes": state.logits.nbytes,
        "cache_bytes": state.cache_bytes,
    }


def main() -> None:
    args = arguments()
    if args.restart:
        args.out.unlink(missing_ok=True)
    if args.part is None:
        plain = [value for value in sys.argv[1:] if value != "--restart"]
        for part in PARTS:
            if part not in read(args):
                subprocess.run(
                    [sys.executable, "-m", "bench.onnx_runtime", *plain, "--part", part],
                    check=True,
                    cwd=common.ROOT,
                    env=os.environ,
                )
        return
    run = {
        "loop": run_loop,
        "export": run_export,
        "export_exact": lambda args: run_export(args, exact=True),
        "torch": run_torch,
        "onnx": run_onnx,
        "decode": run_decode,
    }
    found = run[args.part](args)
    done = read(args) | {args.part: found}
    packages = {name: metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
    common.save_results(args.out, settings(args), packages=packages, **done)


if __name__ == "__main__":
    main()
