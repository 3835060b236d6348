"""Random operands of sparse prefill attention, and its result in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specpass.kernels.shapes import Shapes
from specpass.kernels.sparse.reference import prefill_attention_sparse
from specpass.kernels.spec import Operands

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of outputs that are rounded to the dtype


def make(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """Of prompts that are not read whole, with as many last positions as columns; states lie as models hand them over,
    [B, T, heads, D]. The columns are spread evenly over the prompt."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, kv_heads, ahead = shapes.batch, shapes.kv_heads, shapes.rows - shapes.window
    columns = max(shapes.columns, 2 * shapes.budget + shapes.rows)
    length = columns - ahead

    def normal(heads: int, dim: int) -> Tensor:
        states = torch.randn(batch, columns, heads, dim, generator=generator, device=device)
        return states.to(getattr(torch, shapes.dtype)).transpose(1, 2)

    chosen = torch.rand(batch, kv_heads, length - shapes.window, generator=generator, device=device).argsort(-1)
    return {
        "query": normal(kv_heads * shapes.group, shapes.dim),
        "key": normal(kv_heads, shapes.dim),
        "value": normal(kv_heads, shapes.value_dim),
        "columns": chosen[..., : shapes.budget].sort(-1).values,
        "lengths": torch.full((batch,), length, device=device),
        "scale": 1 / math.sqrt(shapes.dim),
        "window": shapes.window,
        "ahead": ahead,
        "recent": shapes.budget,
    }


def error(operands: Operands, found: Tensor, shapes: Shapes) -> float:
    """By the reference: each row of it holds what it reads, not a whole row of T."""
    exact = {name: operands[name].double() for name in ("query", "key", "value")}
    expected = prefill_attention_sparse(**{**operands, **exact})
    return float((found.double() - expected).abs().max()) / TOLERANCE[shapes.dtype]
