"""vLLM's server behind a draft (specpass serve), whole prompts beside shortened ones, by OpenAI's own client.

One server answers all: each round sends the same lookups twice, first with `X-Specpass-Method: full`, which is vLLM
alone, then shortened to the budget, so many requests at a time; prefix caching is off, so that no prompt finds its own
beginning. The file is written after each round, and a rerun goes on from it. Needs vLLM's environment:

    make vllm
    .venv-vllm/bin/python -m bench.serving
    .venv-vllm/bin/python -m bench.serving --tokens 2048 --budget 256 --requests 16 --concurrency 4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench import common
from specpass.benchmarks.results import Store
from specpass.benchmarks.tasks.scoring import contained
from specpass.kernels.cpu.isa import multiplies

MODES = {"full": {"X-Specpass-Method": "full"}, "specpc": {"X-Specpass-Method": "specpc"}}
NEW = 32


def arguments() -> argparse.Namespace:
    dtype = "bfloat16" if multiplies(torch.bfloat16) else "float32"  # products of bfloat16 are slow there
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="name or folder")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="name or folder")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length")
    parser.add_argument("--budget", type=int, default=1024, help="tokens that the target reads")
    parser.add_argument("--requests", type=int, default=200, help="in all, half of them shortened")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument("--dtype", default=dtype, help="of the engine (default here: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no half round after so many")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "serving.json", help="file to go on from")
    parser.add_argument("--restart", action="store_true", help="forget what the file holds")
    return parser.parse_args()


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server that ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "specpass.cli", "serve", "-t", args.target, "-d", args.draft, "-b", str(args.budget)]
    line += ["--max-model-len", str(args.tokens + 2 * NEW), "--no-enable-prefix-caching", "--enforce-eager"]
    line += ["--dtype", args.dtype, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(line, stdout=log, stderr=log) as server:
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"the server ended:\n{log.read()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


async def ask(client: Any, name: str, mode: str, ids: list[int]) -> dict[str, Any]:
    """One streamed answer: its text, seconds to its first and its last token, tokens that the engine read."""
    since, first, text, usage = time.perf_counter(), None, "", None
    stream = await client.completions.create(
        model=name,
        prompt=ids,
        max_tokens=NEW,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=MODES[mode],
    )
    async for part in stream:
        usage = part.usage or usage
        if part.choices:
            first = first or time.perf_counter()
            text += part.choices[0].text
    assert first is not None, "no token came"
    assert usage is not None, "no usage came"
    ended = time.perf_counter()
    return {
        "mode": mode,
        "first_token_s": round(first - since, 3),
        "total_s": round(ended - since, 3),
        "read": usage.prompt_tokens_read,
        "text": text,
    }


async def run(args: argparse.Namespace, address: str, prompts: list[Any], store: Store) -> None:
    """Answers of all rounds that the store lacks; each record holds the seconds that its round took in all."""
    import openai

    client, end = openai.AsyncOpenAI(base_url=address, api_key="none"), time.perf_counter() + 60 * args.minutes
    with Progress() as bar:
        task = bar.add_task("answers", total=2 * len(prompts))
        for mode in MODES:  # compiles the draft's graph, and warms the engine up
            await ask(client, args.target, mode, list(prompts[0].ids)[::-1])
        for start in range(0, len(prompts), args.concurrency):
            own = prompts[start : start + args.concurrency]
            for mode in MODES:
                if time.perf_counter() > end:
                    return
                if (mode, start + len(own) - 1) not in store:  # the last one that a round writes
                    since = time.perf_counter()
                    found = await asyncio.gather(*(ask(client, args.target, mode, list(prompt.ids)) for prompt in own))
                    round_s = round(time.perf_counter() - since, 2)
                    for index, one in enumerate(found):
                        score = contained(one["text"], own[index].expected)
                        store.add({**one, "prompt": start + index, "score": score, "round": start, "round_s": round_s})
                bar.advance(task, len(own))


def summary(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each mode, and shortened over whole; of the rounds that have both."""
    listed = list(records)
    both = set.intersection(*({record["round"] for record in listed if record["mode"] == mode} for mode in MODES))
    kept = [record for record in listed if record["round"] in both]
    if not kept:
        return {}
    modes: dict[str, dict[str, float]] = {}
    for mode in MODES:
        own = [record for record in kept if record["mode"] == mode]
        modes[mode] = {
            "requests": len(own),
            "first_token_s": common.median(record["first_token_s"] for record in own),
            "total_s": common.median(record["total_s"] for record in own),
            "all_s": round(sum({record["round"]: record["round_s"] for record in own}.values()), 2),
            "score": round(sum(record["score"] for record in own) / len(own), 4),
            "read": common.median(record["read"] for record in own),
        }
    whole, short = modes.values()
    ratio = {what: round(short[what] / whole[what], 4) for what in ("first_token_s", "total_s", "all_s")}
    return {**modes, "ratio": ratio}


def main() -> None:
    args = arguments()
    from specpass.benchmarks.tasks.table import SEPARATING, TASKS

    tokenizer, names = common.load_tokenizer(args.target), [name for name in SEPARATING if name.startswith("niah")]
    prompts = [
        TASKS[names[index % len(names)]].prompt(index // len(names), args.tokens, tokenizer)
        for index in range(args.requests // 2)
    ]
    settings = {name: getattr(args, name) for name in ("tokens", "budget", "requests", "concurrency", "dtype")}
    settings |= {"target": Path(args.target).name, "draft": Path(args.draft).name, "new": NEW}
    store = Store(args.out, settings, ("mode", "prompt"), args.restart, summary)
    with served(args) as address:
        asyncio.run(run(args, address, prompts, store))
    store.save()
    print(f"wrote {args.out}: {store.parts['summary']}")


if __name__ == "__main__":
    main()
