"""Other ways to what a kernel computes, timed beside it by bench/gpu.py."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specpass.kernels import measure
from specpass.kernels.decode.reference import append_kv
from specpass.kernels.registry import REGISTRY


def peers(case: measure.Case) -> dict[str, Callable[[], Any]]:
    """Other ways to the same result, with the same inputs."""
    others = OTHERS.get(case.kernel.name, lambda case: {})
    return {"aten": lambda: measure.fallback(case), **others(case)}


def append_peers(case: measure.Case) -> dict[str, Callable[[], Any]]:
    """Does it win to write the token in attention's launch?"""
    given = case.operands
    storage, new = (given["keys"], given["values"], given["lengths"]), (given["key"], given["value"])
    views = {name: given[name].unflatten(1, (given["key"].shape[1], -1)) for name in ("keys", "values")}
    names = ("query", "lengths", "scale", "softcap", "sinks")
    plain = measure.Case(REGISTRY["decode"], case.shapes, {name: given[name] for name in names} | views)

    def apart() -> None:
        append_kv(*storage, *new)
        measure.run(plain)

    return {"append, then decode": apart}


def decode_peers(case: measure.Case) -> dict[str, Callable[[], Any]]:
    """Attention of other libraries."""
    query, keys, values, scale = (case.operands[name] for name in ("query", "keys", "values", "scale"))
    found: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
    }
    if query.device.type == "cuda":
        flex = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)
        found["flex_attention"] = lambda: flex(query, keys, values, scale=scale, enable_gqa=True)
        flash = _flashinfer(query, keys, values, scale)
        if flash is not None:
            found["flashinfer"] = flash
    return found


def sparse_peers(case: measure.Case) -> dict[str, Callable[[], Any]]:
    """What attention over all columns takes."""
    query, key, value, scale = (case.operands[name] for name in ("query", "key", "value", "scale"))
    return {
        "sdpa, all columns": lambda: scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    }


OTHERS = {"decode": decode_peers, "decode_append": append_peers, "sparse_prefill": sparse_peers}


def _flashinfer(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Callable[[], Any] | None:
    """FlashInfer's batched decode over one page a sequence, or None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    flashinfer: Any = importlib.import_module("flashinfer")
    batch, kv_heads, slots, dim = keys.shape
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    pages = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), slots, dtype=torch.int32, device=query.device)
    wrapper.plan(
        pages,
        pages[:-1],
        last,
        query.shape[1],
        kv_heads,
        dim,
        slots,
        q_data_type=query.dtype,
        kv_data_type=keys.dtype,
        sm_scale=scale,
    )
    return lambda: wrapper.run(query[:, :, 0], (keys, values))
