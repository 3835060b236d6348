"""Random operands of gather_kv, and whether a result is right, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Operands


def make(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """K and V lie in memory as models hand them over, [B, T, K, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, kv_heads, columns = shapes.batch, shapes.kv_heads, max(shapes.columns, shapes.budget)

    def normal(dim: int) -> Tensor:
        states = torch.randn(batch, columns, kv_heads, dim, generator=generator, device=device)
        return states.to(getattr(torch, shapes.dtype)).transpose(1, 2)

    key, value = normal(shapes.dim), normal(shapes.value_dim)
    chosen = torch.rand(batch, kv_heads, columns, generator=generator, device=device).argsort(-1)
    positions = chosen[..., : shapes.budget].sort(-1).values
    return {"key": key, "value": value, "positions": positions, "room": shapes.room}


def error(operands: Operands, found: tuple[Tensor, Tensor, Tensor]) -> float:
    """0, or infinity where a row is another than the one kept, a free slot holds something, or a count is wrong."""
    positions = operands["positions"]
    budget, (keys, values, lengths) = positions.shape[2], found
    right = bool((lengths == budget).all())
    for stored, states in ((keys, operands["key"]), (values, operands["value"])):
        slots = stored.unflatten(1, (positions.shape[1], budget + operands["room"]))
        kept = states.gather(2, positions[..., None].expand(-1, -1, -1, states.shape[3]))
        right &= torch.equal(slots[:, :, :budget], kept) and not bool(slots[:, :, budget:].any())
    return 0.0 if right else math.inf
