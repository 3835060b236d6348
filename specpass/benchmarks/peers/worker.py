"""Runs kvpress for `specpass bench`, in kvpress's own environment: imports nothing of specpass.

    python worker.py JOB.json

JOB: {"what": "answer", "model": folder, "dtype": ..., "device": ..., "prompts": [{"ids": [...], "seen": n,
"new_tokens": n, "presses": [{"name": "kvpress_snapkv", "budget": 64}, ...]}, ...]}: a press sees the first `seen` ids,
and the others come behind what it keeps. Prints a JSON line for each press of each prompt:
{"prompt": index, "press": index, "tokens": [...], "seconds": ..., "kept": mean slots per KV head and layer}.

{"what": "speed", ..., "length": S, "batch": B, "budget": C, "steps": n, "prefills": n} prints one line; see `speed`.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

WINDOW = 32


def make_press(name: str, budget: int | float, length: int) -> Any:
    """The press that keeps `budget` of `length` slots: int(length * (1 - ratio)), KVzip on average over all heads.

    A float is the share that is kept.
    """
    import kvpress

    if isinstance(budget, float):
        ratio = 1.0 - budget
    else:
        ratio = max(0.0, 1.0 - (budget + (0.0 if name == "kvpress_kvzip" else 0.5)) / length)
    if name == "kvpress_snapkv":
        return kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW)
    if name == "kvpress_adakv_snapkv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW))
    if name == "kvpress_expected_attention":
        return kvpress.ExpectedAttentionPress(compression_ratio=ratio)
    if name == "kvpress_criticaladakv_snapkv":
        return kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio, window_size=WINDOW))
    if name == "kvpress_keydiff":
        return kvpress.KeyDiffPress(compression_ratio=ratio)
    if name == "kvpress_kvzip":
        return kvpress.KVzipPress(compression_ratio=ratio)
    raise ValueError(f"unknown press {name!r}")


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def set_masks(model: Any, masks: list[Any]) -> None:
    """What AdaKV and KVzip drop they mask: kvpress's attention reads the indices from the module."""
    for module, mask in zip(attentions(model), masks, strict=True):
        module.masked_key_indices = mask


def take_masks(model: Any) -> list[Any]:
    """The masks that a press left, removed."""
    found = [getattr(module, "masked_key_indices", None) for module in attentions(model)]
    set_masks(model, [None] * len(found))
    return found


def prefill_together(model: Any, ids: Any, presses: list[Any]) -> tuple[int, list[tuple[Any, list[Any]]]]:
    """(first token, a (cache, masks) for each press): one prefill, whose layers each press prunes for itself.

    A press reads a layer's full K/V after the layer's attention used them, so what the others keep is nothing to it.
    """
    caches = [DynamicCache() for _ in presses]
    masks: list[list[Any]] = [[] for _ in presses]

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for press, cache, mask in zip(presses, caches, masks, strict=True):
            module.masked_key_indices = None
            keys, values = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs)
            cache.update(keys.clone(), values.clone(), module.layer_idx)
            mask.append(module.masked_key_indices)
            module.masked_key_indices = None
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]  # one layer's full K/V at a time

    for press in presses:
        press.post_init_from_model(model)
    handles = []
    for module in attentions(model):
        module.rotary_emb = model.model.rotary_emb
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        logits = model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1).logits
    finally:
        for handle in handles:
            handle.remove()
    return int(logits[0, -1].argmax()), list(zip(caches, masks, strict=True))


def prefill(model: Any, ids: Any, press: Any) -> tuple[int, Any, list[Any]]:
    """(first token, cache, masks) of one press, as kvpress's own context manager runs it."""
    cache = DynamicCache()
    with press(model):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return int(logits[0, -1].argmax()), cache, take_masks(model)


def prefill_kvzip(model: Any, ids: Any, budgets: list[int]) -> tuple[int, list[tuple[Any, list[Any]]]]:
    """(first token, a (cache, masks) for each budget): KVzip's scores once, its choice for each budget."""
    import kvpress

    found: list[list[Any]] = []

    class Zip(kvpress.KVzipPress):
        def compress_post(self, model: Any) -> None:
            for budget in budgets:
                self.compression_ratio = make_press("kvpress_kvzip", budget, ids.shape[1]).compression_ratio
                super().compress_post(model)
                found.append(take_masks(model))

    first, cache, _ = prefill(model, ids, Zip(compression_ratio=0.5))
    # decoding writes into what a mask drops: each budget has a copy
    return first, [(copy.deepcopy(cache), masks) for masks in found]


def decode(
    model: Any, cache: Any, masks: list[Any], first: int, length: int, new_tokens: int, behind: Sequence[int] = ()
) -> list[int]:
    """Greedy tokens behind a pruned prompt of `length` tokens, positions counted as in the whole prompt.

    Args: first: the answer's first token, but where ids of the prompt come `behind` what the press saw.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    set_masks(model, masks)
    if behind:
        positions = torch.arange(length - len(behind), length, device=model.device)[None]
        ids = torch.tensor([list(behind)], device=model.device)
        logits = model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
        first = int(logits[0, -1].argmax())
    tokens = [first]
    while len(tokens) < new_tokens and tokens[-1] not in ends:
        position = torch.tensor([[length + len(tokens) - 1]], device=model.device)
        ids = torch.tensor([[tokens[-1]]], device=model.device)
        logits = model(input_ids=ids, past_key_values=cache, position_ids=position).logits
        tokens.append(int(logits[0, -1].argmax()))
    set_masks(model, [None] * len(masks))
    return tokens


def kept_slots(cache: Any, masks: list[Any]) -> float:
    """Slots that attention reads, per KV head and layer."""
    heads = sum(layer.keys.shape[1] for layer in cache.layers)
    slots = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
    dropped = sum(0 if mask is None else len(mask[2]) for mask in masks)
    return (slots - dropped) / heads


def answer(model: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dict for each press of each prompt; budgets of KVzip share its scores, other presses share the prefill."""
    for number, prompt in enumerate(job["prompts"]):
        length, seen = len(prompt["ids"]), prompt["seen"]
        ids = torch.tensor([prompt["ids"][:seen]], device=model.device)
        zips = [index for index, press in enumerate(prompt["presses"]) if press["name"] == "kvpress_kvzip"]
        others = [index for index in range(len(prompt["presses"])) if index not in zips]
        for indices in filter(None, (others, zips)):
            presses, start = [prompt["presses"][index] for index in indices], time.perf_counter()
            if indices is zips:
                first, found = prefill_kvzip(model, ids, [press["budget"] for press in presses])
            else:
                made = [make_press(press["name"], press["budget"], seen) for press in presses]
                first, found = prefill_together(model, ids, made)
            prefilled = time.perf_counter() - start
            for index, (cache, masks) in zip(indices, found, strict=True):
                start, kept = time.perf_counter(), kept_slots(cache, masks)
                tokens = decode(model, cache, masks, first, length, prompt["new_tokens"], prompt["ids"][seen:])
                seconds = prefilled + time.perf_counter() - start
                yield {"prompt": number, "press": index, "tokens": tokens, "seconds": seconds, "kept": kept}


def peak_bytes() -> int:
    """The process's high-water mark."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def speed(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """ttft_s of prefills with SnapKV (None without any), decode_tokens_per_s on a cache of C random slots."""
    config, batch, length, budget = model.config, job["batch"], job["length"], job["budget"]
    vocabulary = min(20_000, config.vocab_size)
    times: list[float] = []
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    for _ in range(job["prefills"]):
        start, cache = time.perf_counter(), DynamicCache()
        with make_press("kvpress_snapkv", budget, length)(model):
            token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        token.cpu()
        times.append(time.perf_counter() - start)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, min(budget, length), head)
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    token, steps = ids[:, -1:], []
    for step in range(job["steps"] + 2):  # two to warm up
        start = time.perf_counter()
        position = torch.full((batch, 1), length + step, device=model.device)
        token = model(input_ids=token, past_key_values=cache, position_ids=position).logits[:, -1:].argmax(-1)
        token.cpu()
        steps.append(time.perf_counter() - start)
    kv_bytes = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else peak_bytes()
    return {
        "ttft_s": statistics.median(times) if times else None,
        "decode_tokens_per_s": batch / statistics.median(steps[2:]),
        "kv_bytes": kv_bytes,
        "peak_bytes": peak,
    }


@torch.no_grad()
def main() -> None:
    logging.disable_progress_bar()  # stderr is shown when something fails
    job = json.loads(Path(sys.argv[1]).read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    model = model.eval().requires_grad_(False).to(job["device"])
    if getattr(model.config, "head_dim", None) is None:  # Qwen2's; CriticalKV reads it of any
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    if job["what"] == "speed":
        print(json.dumps(speed(model, job)), flush=True)
        return
    for line in answer(model, job):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
