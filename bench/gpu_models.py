"""The part of bench/gpu.py that runs whole models, with random weights: times and memory do not depend on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

import specpass
from specpass.lowering.cuda_graph import GraphedModule
from specpass.observe.streaming import Clock

if TYPE_CHECKING:
    from bench.gpu import Run

TARGET = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}  # Llama-3.1-8B
DRAFT = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}  # Llama-3.2-1B
SHARED = {"vocab_size": 128256, "max_position_embeddings": 140_000, "rope_theta": 500_000.0}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
# Prompt length and batch, in the order of what they tell, and the least seconds left that each is begun with.
CASES = {(8192, 1): 10.0, (32768, 1): 12.0, (131072, 1): 30.0}
LONG = 100_000  # tokens of a prompt from which on each time is taken once: a prefill takes many seconds
TRACED = 8  # tokens of the answer that is looked at kernel by kernel


def make_model(sizes: dict[str, Any], device: str, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """A Llama of these sizes with random weights, made on the device; bfloat16 on a GPU where no dtype is named."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    config = LlamaConfig(**sizes, eos_token_id=None, attn_implementation="sdpa", dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # every run writes all its tokens
    return model.eval().requires_grad_(False)


def end_to_end(run: Run) -> None:
    """Time to first token, decode tokens/s and peak memory of full KV and of each method, compiled once each."""
    pair = (TINY, TINY) if run.tiny else ({**TARGET, **SHARED}, {**DRAFT, **SHARED})
    target, draft = (make_model(sizes, run.device, seed=seed) for seed, sizes in enumerate(pair))
    budget, window, ahead, columns = (24, 8, 4, 16) if run.tiny else (1024, 32, 32, 2048)
    methods: dict[str, Any] = {
        "full KV": None,
        "SpecKV": specpass.SpecKV(budget, window=window, lookahead=ahead),
        "SpecKV, sparse prefill": specpass.SpecKV(budget, window=window, lookahead=ahead, sparse_prefill=columns),
        "SpecPC": specpass.SpecPC(budget, window=window),
        "SnapKV": specpass.SnapKV(budget, window=window),
    }
    cases = {(60, 1): 0.0} if run.tiny else CASES
    for name, method in methods.items():
        model = target
        if method is not None:  # tiny models are proved without Inductor, which would take most of the time
            drafts, lowering = (draft if method.needs_draft else None), "eager" if run.tiny else "inductor"
            model = specpass.compile(target, draft=drafts, method=method, lowering=lowering)
        try:
            for (length, batch), needs in cases.items():
                label = f"{name}, S {length}, batch {batch}"
                case = (model, method, length, batch)
                run.step("end_to_end", label, lambda case=case: one(run, *case), needs=needs)
            length, batch = next(iter(cases))
            run.step("breakdown", name, lambda case=(model, method, length, batch): breakdown(run, *case))
        finally:
            specpass.restore(target)
    torch._dynamo.reset()


def answer(run: Run, model: Any, method: Any, length: int, batch: int) -> Callable[[int], list[float]]:
    """A function: seconds of the first token and of each step behind it, of an answer of so many tokens."""
    cuda = run.device.startswith("cuda")
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=run.device)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    if method is None and cuda and length < LONG:
        options["cache_implementation"] = "static"  # generate() compiles its decode step then

    def seconds(tokens: int) -> list[float]:
        clock = Clock()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, streamer=clock, **options)
        assert out.shape[1] == length + tokens, "a run stopped early"
        return [clock.times[1] - start, *clock.steps]

    return seconds


def one(run: Run, model: Any, method: Any, length: int, batch: int) -> dict[str, Any]:
    """One method at one prompt length; the first, compiling call is not timed."""
    cuda, new = run.device.startswith("cuda"), 8 if run.tiny else 64
    seconds = answer(run, model, method, length, batch)
    cold = sum(seconds(new))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    spans = [seconds(new) for _ in range(1 if length >= LONG else 3)]
    first = statistics.median(span[0] for span in spans)
    step = statistics.median(each for span in spans for each in span[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    kept = length if method is None else min(length, method.budget)
    rate = run.document.get("rates", {}).get("device", {}).get("copy_bytes_s")
    bound = None if rate is None else batch * rate / step_bytes(model, kept, batch)
    return {
        "first_token_s": first,
        "decode_tokens_s": batch / step,
        "bound_tokens_s": bound,
        "peak_gib": peak,
        "new_tokens": new,
        "cold_s": cold,
        "static_cache": method is None and cuda and length < LONG,
    }


def breakdown(run: Run, model: Any, method: Any, length: int, batch: int) -> dict[str, Any]:
    """Where a first token's and a decode step's time goes: busy milliseconds of the device, the largest kernels."""
    seconds = answer(run, model, method, length, batch)
    first, steps = traced(run, lambda: seconds(1)), traced(run, lambda: seconds(1 + TRACED))
    names = {**first["kernels_ms"], **steps["kernels_ms"]}
    each = {name: (steps["kernels_ms"].get(name, 0.0) - first["kernels_ms"].get(name, 0.0)) / TRACED for name in names}
    return {
        "first_token": {**first, "kernels_ms": largest(first["kernels_ms"])},
        "decode_step": {
            "wall_ms": (steps["wall_ms"] - first["wall_ms"]) / TRACED,
            "busy_ms": (steps["busy_ms"] - first["busy_ms"]) / TRACED,
            "launches": (steps["launches"] - first["launches"]) / TRACED,
            "kernels_ms": largest(each),
        },
        "draft_step_ms": draft_step_ms(run, lambda: seconds(1)),
    }


def draft_step_ms(run: Run, call: Callable[[], Any]) -> float | None:
    """Median milliseconds of a draft's step on the device: a subgraph that one prompt calls again and again."""
    cuda = run.device.startswith("cuda")
    begun: dict[nn.Module, Any] = {}
    spans: dict[nn.Module, list[tuple[Any, Any]]] = {}

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, (GraphedModule, fx.GraphModule)):
            begun[module] = now()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in begun:
            spans.setdefault(module, []).append((begun.pop(module), now()))

    hooks = nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if cuda:
        torch.cuda.synchronize()
    steps = [pair for pairs in spans.values() if len(pairs) > 1 for pair in pairs]
    if not steps:
        return None
    return statistics.median(a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in steps)


def traced(run: Run, call: Callable[[], Any]) -> dict[str, Any]:
    """One call under the profiler."""
    cuda = run.device.startswith("cuda")
    call()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = found.key_averages()
    kernels = {event.key[:80]: getattr(event, own) / 1e3 for event in events}
    launches = sum(event.count for event in events)
    return {"wall_ms": 1e3 * wall, "busy_ms": sum(kernels.values()), "launches": launches, "kernels_ms": kernels}


def largest(kernels: dict[str, float], count: int = 12) -> dict[str, float]:
    ordered = sorted(kernels.items(), key=lambda item: -item[1])
    return {name: round(ms, 4) for name, ms in ordered[:count]}


def step_bytes(model: Any, slots: int, batch: int) -> float:
    """Bytes that a decode step cannot but read: every weight but the embedding's, and the K and V of `slots` tokens."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    item = next(model.parameters()).element_size()
    return weights + 2 * batch * slots * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
