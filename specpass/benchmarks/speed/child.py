"""One measurement in a process of its own, so that memory and compilation are its own: python -m ... JOB.json.

JOB: {"what": "compile" | "measure" | "by_turns" | "profile" | "rates", "method", "budget", "length", "batch",
"prefills", "steps", "target", "draft", "dtype", "device", "lowering"}. The last line printed is the result as JSON.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import specpass
from specpass.benchmarks import methods
from specpass.benchmarks.models import Pair
from specpass.benchmarks.speed import profiles, rates
from specpass.methods.base import Method
from specpass.observe.storage import cache_bytes, step_weight_bytes
from specpass.observe.streaming import Clock

WARM_UP_STEPS = 3
COMPILE_TOKENS = 8
FULL = ("full_eager", "full_static_compiled")  # what is not a method of specpass
TURNS, TURN_STEPS = 8, 4


class Engine:
    """A method on the pair, as its users run it: everything goes through `generate`.

    Raises: BenchmarkError: neither full KV nor a method of specpass.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.name = job, job["method"]
        pair = Pair(job["target"], job["draft"], job["dtype"], job["device"], job["lowering"], job.get("trust", False))
        self.model, self.device = pair.target, job["device"]
        self.method: Method | None = None
        if self.name not in FULL:
            self.method = methods.make(self.name, job["budget"])
            draft = pair.draft if self.method.needs_draft else None
            specpass.compile(self.model, draft=draft, method=self.method, lowering=job["lowering"])

    @property
    def shortest(self) -> int:
        """A prompt that the method prunes, long enough for its graphs."""
        return 256 if self.method is None else max(640, self.job["budget"] + 128)

    def ids(self, length: int) -> torch.Tensor:
        """Random prompt ids [B, length], the same in every process."""
        vocabulary = min(20_000, self.model.config.vocab_size)
        generator = torch.Generator().manual_seed(length)
        return torch.randint(3, vocabulary, (self.job["batch"], length), generator=generator).to(self.device)

    def generate(self, ids: torch.Tensor, new_tokens: int, **options: Any) -> Any:
        """`new_tokens` tokens, no more and no fewer; the cache is in the result."""
        if self.name == "full_static_compiled":
            # transformers compiles decode steps on a GPU; on a CPU it has to be told
            config = CompileConfig() if self.device.startswith("cuda") else CompileConfig(mode="default")
            config._compile_all_devices = True
            options["compile_config"] = config
            if "past_key_values" not in options:
                options["cache_implementation"] = "static"
        return self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        )

    def seconds(self, length: int, new_tokens: int) -> float:
        """From the prompt to the last token."""
        ids, start = self.ids(length), time.perf_counter()
        self.generate(ids, new_tokens).sequences.cpu()
        return time.perf_counter() - start

    # -- decode behind a long prompt that nobody read: keys and values are random

    def filled_cache(self) -> Any:
        """A cache as after a prompt of S tokens, filled with random numbers."""
        config, batch, length = self.model.config, self.job["batch"], self.job["length"]
        if self.method is not None:
            # A short prompt makes the same slots; what they hold, and how long the prompt was, is then changed.
            cache = self.generate(self.ids(self.shortest), 1).past_key_values
            for layer in cache.layers:
                layer.key_buffer.normal_()
                layer.value_buffer.normal_()
            cache.seen.fill_(length)
            return cache
        heads = config.num_key_value_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, heads, length, head)
        if self.name == "full_static_compiled":
            room = length + self.job["steps"] + WARM_UP_STEPS + 2
            cache = StaticCache(config=config, max_cache_len=room)
            cache.early_initialization(batch, heads, head, self.model.dtype, self.model.device)
            for layer in cache.layers:
                layer.keys.normal_()
                layer.values.normal_()
                layer.cumulative_length.fill_(length)
            return cache
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            pair = (torch.randn(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
            cache.update(*pair, index)
        return cache

    def decode_seconds(self, cache: Any, steps: int) -> list[float]:
        """Seconds of each decode step behind what `cache` holds."""
        ids, clock = self.ids(int(cache.get_seq_length()) + 1), Clock()
        self.generate(ids, steps + 1, past_key_values=cache, streamer=clock)
        return clock.steps


def reset_peak(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the present size again


def peak_bytes(device: str) -> int | None:
    """Most bytes that were in use since `reset_peak`: of the device, or of this process; None where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def compile_time(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds that the first generation takes longer than a second one: tracing and compiling."""
    engine = Engine(job)
    first, second = (engine.seconds(engine.shortest, COMPILE_TOKENS) for _ in range(2))
    return {"compile_s": max(0.0, first - second)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token of real prefills, milliseconds of decode steps, bytes."""
    engine, device = Engine(job), job["device"]
    if job["prefills"]:
        engine.seconds(engine.shortest, 1)  # compiles
        reset_peak(device)
        times = [engine.seconds(job["length"], 1) for _ in range(job["prefills"])]
        prefill_peak = peak_bytes(device)
    else:
        times, prefill_peak = [], None
    cache = engine.filled_cache()
    engine.decode_seconds(cache, WARM_UP_STEPS)
    reset_peak(device)
    steps = engine.decode_seconds(cache, job["steps"])
    return {
        "ttft_s": statistics.median(times) if times else None,
        "decode_ms": 1000 * statistics.median(steps),
        "decode_tokens_per_s": job["batch"] / statistics.median(steps),
        "kv_bytes": cache_bytes(cache),
        "peak_bytes": max(filter(None, (prefill_peak, peak_bytes(device))), default=None),
        "weight_bytes": step_weight_bytes(engine.model),
    }


def by_turns(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of decode steps of the job's method and of job["other"]'s, a few of each by turns in one process.

    A machine that others share drifts within minutes, which two processes one after the other would show as a
    difference of the methods.
    """
    room = {"steps": TURNS * (TURN_STEPS + 1)}
    engines = [Engine({**job, **room}), Engine({**job, **job["other"], **room})]
    caches = [engine.filled_cache() for engine in engines]
    steps: list[list[float]] = [[], []]
    for engine, cache in zip(engines, caches, strict=True):
        engine.decode_seconds(cache, WARM_UP_STEPS)
    for _ in range(TURNS):
        for engine, cache, times in zip(engines, caches, steps, strict=True):
            times += engine.decode_seconds(cache, TURN_STEPS)
    ours, other = (1000 * statistics.median(times) for times in steps)
    kv, other_kv = (cache_bytes(cache) for cache in caches)
    return {"decode_ms": ours, "other_decode_ms": other, "kv_bytes": kv, "other_kv_bytes": other_kv}


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Where the time of a prefill and of a decode step goes, by groups of operators."""
    engine = Engine(job)
    engine.seconds(engine.shortest, 1)
    cache = engine.filled_cache()
    engine.decode_seconds(cache, WARM_UP_STEPS)
    return {
        "prefill": profiles.shares(lambda: engine.seconds(job["length"], 1)),
        "decode": profiles.shares(lambda: engine.decode_seconds(cache, job["steps"])),
    }


def machine_rates(job: dict[str, Any]) -> dict[str, Any]:
    device = job["device"]
    return {"bytes_per_s": rates.bandwidth(device), "flops_per_s": rates.matmul_rate(device, job["dtype"])}


@torch.no_grad()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    calls = {
        "compile": compile_time,
        "measure": measure,
        "by_turns": by_turns,
        "profile": profile,
        "rates": machine_rates,
    }
    print(json.dumps(calls[job["what"]](job)), flush=True)


if __name__ == "__main__":
    main()
