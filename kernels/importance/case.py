"""Random operands of importance, and its result in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specpass.kernels.attention import soft_capped
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Operands

TOLERANCE = 2e-5  # scores are float32 in every dtype


def make(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """Without a log-sum-exp; keys lie in memory as models hand them over, [B, T, K, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads, ahead = shapes.batch, shapes.kv_heads * shapes.group, shapes.rows - shapes.window
    length = shapes.columns - ahead

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(getattr(torch, shapes.dtype))

    rows = (torch.arange(-shapes.window, ahead, device=device) + length).clamp(min=-1).expand(batch, -1)
    return {
        "sinks": torch.randn(heads, generator=generator, device=device) if shapes.sinks else None,
        "key": normal(batch, shapes.columns, shapes.kv_heads, shapes.dim).transpose(1, 2),
        "query": 2 * normal(batch, heads, shapes.rows, shapes.dim),
        "rows": rows.contiguous(),
        "lengths": torch.full((batch,), length, device=device),
        "window": shapes.window,
        "scale": 1 / math.sqrt(shapes.dim),
        "reduce": shapes.reduce,
        "weights": torch.linspace(0, 1, shapes.rows, device=device) if shapes.weighted else None,
        "lse": None,
        "softcap": shapes.softcap,
    }


def error(operands: Operands, found: Tensor) -> float:
    """Relative: probabilities are small at long prompts."""
    expected = scores(operands)
    return float(((found.double() - expected).abs() / (expected + 1e-3)).max()) / TOLERANCE


def logits(operands: Operands, head: int) -> Tensor:
    """[B, G, R, T] float64 of one KV head, scaled and capped: all heads at once would be gigabytes."""
    query, key = operands["query"], operands["key"]
    group = query.shape[1] // key.shape[1]
    own = query[:, head * group : (head + 1) * group].double()
    return soft_capped(own @ key[:, [head]].double().transpose(2, 3) * operands["scale"], operands["softcap"])


def hidden(operands: Operands) -> Tensor:
    """[B, 1, R, T]: the columns behind each row."""
    key, rows = operands["key"], operands["rows"]
    return (torch.arange(key.shape[2], device=key.device) > rows[..., None])[:, None]


def log_sum_exp(operands: Operands) -> Tensor:
    """[B, H, R] float64."""
    unseen, kv_heads = hidden(operands), operands["key"].shape[1]
    heads = [logits(operands, head).masked_fill_(unseen, -math.inf).logsumexp(-1) for head in range(kv_heads)]
    lse, sinks = torch.cat(heads, 1), operands["sinks"]
    return lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])


def scores(operands: Operands) -> Tensor:
    """[B, K, T] float64."""
    key, reduce, weights = (operands[name] for name in ("key", "reduce", "weights"))
    unseen, lse = hidden(operands), log_sum_exp(operands).unflatten(1, (key.shape[1], -1))
    found = []
    for head in range(key.shape[1]):
        shares = (logits(operands, head) - lse[:, head, ..., None]).exp_().masked_fill_(unseen, 0.0)
        if weights is not None:
            shares.mul_(weights.double()[:, None])
        total = shares.amax if reduce == "max" else shares.mean if reduce == "mean" else shares.sum
        found.append(total((1, 2)))
    end = (operands["lengths"] - operands["window"])[:, None]
    outside = torch.arange(key.shape[2], device=key.device) >= end
    return torch.stack(found, 1).masked_fill(outside[:, None], 0.0)
