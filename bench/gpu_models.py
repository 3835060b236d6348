"""The part of bench/gpu.py that runs whole models, with random weights: times and memory do not depend on them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

import specpass

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
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
# Prompt length and batch, in the order of what they tell, and the least seconds left that each is begun with.
CASES = {(8192, 1): 30.0, (32768, 1): 40.0, (131072, 1): 75.0, (8192, 8): 40.0, (32768, 8): 75.0, (131072, 8): 240.0}
LONG = 100_000  # tokens of a prompt from which on each time is taken once: a prefill takes many seconds


def make_model(sizes: dict[str, Any], device: str) -> Any:
    """A Llama of these sizes with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
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
    """Time to first token, decode tokens/s and peak memory of full KV and of each method."""
    pair = (TINY, TINY) if run.tiny else ({**TARGET, **SHARED}, {**DRAFT, **SHARED})
    target, draft = (make_model(sizes, run.device) for sizes in pair)
    budget, window, ahead = (24, 8, 4) if run.tiny else (1024, 32, 32)
    methods: dict[str, Any] = {
        "full KV": None,
        "SpecKV": specpass.SpecKV(budget, window=window, lookahead=ahead),
        "SpecPC": specpass.SpecPC(budget, window=window),
    }
    cases = {(60, 1): 0.0, (60, 2): 0.0} if run.tiny else CASES
    for (length, batch), needs in cases.items():
        for name, method in methods.items():
            run.step(
                "end_to_end",
                f"{name}, S {length}, batch {batch}",
                lambda method=method, length=length, batch=batch: one(run, target, draft, method, length, batch),
                needs=needs,
            )
    torch._dynamo.reset()


def one(run: Run, target: Any, draft: Any, method: Any, length: int, batch: int) -> dict[str, Any]:
    """One method at one prompt length; the first, compiling call is not timed."""
    cuda, new = run.device.startswith("cuda"), 8 if run.tiny else 64
    ids = torch.randint(0, target.config.vocab_size, (batch, length), device=run.device)
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    model, compiled = target, True
    if method is not None:
        # Tiny models are proved without Inductor, which would take most of the time.
        lowering = "eager" if run.tiny else "inductor"
        model = specpass.compile(target, draft=draft, method=method, lowering=lowering, cudagraphs=cuda)
    elif cuda:
        options["cache_implementation"] = "static"  # generate() compiles its decode step then
    else:
        compiled = False

    def seconds(tokens: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        if cuda:
            torch.cuda.synchronize()
        assert out.shape[1] == length + tokens, "a run stopped early"
        return time.perf_counter() - start

    try:
        seconds(new)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        repeats = 1 if length >= LONG else 2
        first = min(seconds(1) for _ in range(repeats))
        whole = min(seconds(new) for _ in range(repeats))
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    finally:
        if method is not None:
            specpass.restore(model)
    kept = length if method is None else min(length, method.budget)
    rate = run.document["rates"]["device"].get("copy_bytes_s")
    bound = None if rate is None else batch * rate / step_bytes(target, kept, batch)
    return {
        "first_token_s": first,
        "decode_tokens_s": batch * (new - 1) / max(whole - first, 1e-9),
        "bound_tokens_s": bound,
        "peak_gib": peak,
        "new_tokens": new,
        "compiled": compiled,
    }


def step_bytes(model: Any, slots: int, batch: int) -> float:
    """Bytes that a decode step cannot but read: every weight but the embedding's, and the K and V of `slots` tokens."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    item = next(model.parameters()).element_size()
    return weights + 2 * batch * slots * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
