"""Random operands of reconstruction, and its result in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specpass.kernels.importance import case as importance
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Operands

TOLERANCE = {"float32": 5e-5, "float16": 5e-5, "bfloat16": 1e-3}  # p and o are two numbers of the dtype


def make(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """As importance's; values lie in memory as keys do."""
    operands = importance.make(shapes, device, seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    sizes = (shapes.batch, shapes.columns, shapes.kv_heads, shapes.value_dim)
    value = torch.randn(*sizes, generator=generator, device=device).to(getattr(torch, shapes.dtype)).transpose(1, 2)
    shared = ("query", "key", "rows", "lengths", "window", "scale", "reduce", "softcap", "sinks")
    return {name: operands[name] for name in shared} | {"value": value, "lookahead": 0, "bias": None}


def error(operands: Operands, found: Tensor, shapes: Shapes) -> float:
    """Relative: a column's share is small at long prompts."""
    expected = scores(operands)
    return float(((found.double() - expected).abs() / (expected + 1e-3)).max()) / TOLERANCE[shapes.dtype]


def scores(operands: Operands) -> Tensor:
    """[B, K, T] float64."""
    key, value, rows = operands["key"], operands["value"].double(), operands["rows"]
    kv_heads, columns = key.shape[1:3]
    unseen = importance.hidden(operands)
    lse, found = importance.log_sum_exp(operands).unflatten(1, (kv_heads, -1)), []
    for head in range(kv_heads):
        p = (importance.logits(operands, head) - lse[:, head, ..., None]).exp_().masked_fill_(unseen, 0.0)
        far = torch.cdist(p @ value[:, head, None], value[:, head, None])  # [B, G, R, T]
        moved = p / (1 - p) * far
        live = (rows >= 0).sum(1)[:, None] * p.shape[1]
        found.append(moved.amax((1, 2)) if operands["reduce"] == "max" else moved.sum((1, 2)) / live)
    end = (operands["lengths"] - operands["window"])[:, None]
    outside = torch.arange(columns, device=key.device) >= end
    return torch.stack(found, 1).masked_fill(outside[:, None], 0.0)
