"""Random operands of decode attention, and its result in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from specpass.bits import Layout
from specpass.kernels.attention import soft_capped
from specpass.kernels.bits.reference import dequantize, quantize_kv
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Operands

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of outputs that are rounded to the dtype


def make(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """Of `attend`; every slot is in use."""
    operands = _storage(shapes, device, torch.Generator(device).manual_seed(seed))
    operands |= {"lengths": torch.full((shapes.batch, shapes.kv_heads), shapes.slots, device=device)}
    return operands | _offsets(operands, shapes, device)


def make_append(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """Of `append_attend`; the new token takes the last slot."""
    generator = torch.Generator(device).manual_seed(seed)
    operands = _storage(shapes, device, generator)
    for name in ("keys", "values"):
        operands[name] = operands[name].flatten(1, 2)
    heads = (shapes.batch, shapes.kv_heads)
    return (
        operands
        | {
            "key": _normal(generator, shapes, device, *heads, 1, shapes.dim),
            "value": _normal(generator, shapes, device, *heads, 1, shapes.value_dim),
            "lengths": torch.full(heads, shapes.slots - 1, device=device),
        }
        | _offsets(operands, shapes, device)
    )


def make_codes(shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
    """Of `attend` over a quantised prompt of C slots and N behind it, 16 at least, all of them in use."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, room = (shapes.batch, shapes.kv_heads), max(shapes.room, 16)
    operands = _storage(dataclasses.replace(shapes, room=room), device, generator)
    used = torch.full(heads, shapes.budget, device=device)
    flat = [operands[name].flatten(1, 2) for name in ("keys", "values")]
    keys, values, _, *quantized = quantize_kv(flat[0], flat[1], used, shapes.budget, room, shapes.bits)
    behind = {name: states.unflatten(1, (heads[1], room)) for name, states in (("keys", keys), ("values", values))}
    lengths = torch.full(heads, room, device=device)
    return operands | behind | {"lengths": lengths, "quantized": quantized, "bits": shapes.bits}


def error_codes(operands: Operands, found: Tensor, shapes: Shapes) -> float:
    """Against float64 attention over the numbers that the codes are, rounded to the dtype as the kernel rounds them."""
    codes, _, basis = operands["quantized"]
    layout = Layout(shapes.bits, shapes.dim, shapes.value_dim, shapes.itemsize)
    whole = {}
    for name, part in (("keys", "key"), ("values", "value")):
        states = operands[name]
        prompt = dequantize(codes, basis, layout, part, states.dtype)[:, :, : shapes.budget].to(states.dtype)
        whole[name] = torch.cat([prompt, states], 2)
    size = whole["keys"].shape[2] - shapes.budget
    exact = attention({**operands, **whole}, dataclasses.replace(shapes, room=size))
    return float((found.double() - exact).abs().max()) / TOLERANCE[shapes.dtype]


def _offsets(operands: Operands, shapes: Shapes, device: str) -> dict[str, Any]:
    """Of heads with budgets of their own, which are equal here: where each begins, and one storage of all of them."""
    if not shapes.ragged:
        return {}
    starts = (torch.arange(shapes.kv_heads, device=device) * shapes.slots).repeat(shapes.batch, 1)
    flat = {name: operands[name].view(shapes.batch, -1, operands[name].shape[-1]) for name in ("keys", "values")}
    return flat | {"offsets": starts}


def _storage(shapes: Shapes, device: str, generator: torch.Generator) -> dict[str, Any]:
    heads = shapes.kv_heads * shapes.group
    return {
        "sinks": torch.randn(heads, generator=generator, device=device) if shapes.sinks else None,
        "keys": _normal(generator, shapes, device, shapes.batch, shapes.kv_heads, shapes.slots, shapes.dim),
        "values": _normal(generator, shapes, device, shapes.batch, shapes.kv_heads, shapes.slots, shapes.value_dim),
        "query": _normal(generator, shapes, device, shapes.batch, heads, 1, shapes.dim),
        "scale": 1 / math.sqrt(shapes.dim),
        "softcap": shapes.softcap,
    }


def _normal(generator: torch.Generator, shapes: Shapes, device: str, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator, device=device).to(getattr(torch, shapes.dtype))


def error(operands: Operands, found: Tensor, shapes: Shapes) -> float:
    """Infinity where a call did not leave every slot in use."""
    if not bool((operands["lengths"] == shapes.slots).all()):
        return math.inf
    return float((found.double() - attention(operands, shapes)).abs().max()) / TOLERANCE[shapes.dtype]


def error_lse(operands: Operands, found: tuple[Tensor, Tensor], shapes: Shapes) -> float:
    """Of `append_attend_lse`; its log-sum-exp is float32 whatever the dtype."""
    out, lse = found
    expected = logits_of(operands, shapes).logsumexp(-1).view(lse.shape)
    own = float((lse.double() - expected).abs().max()) / TOLERANCE["float32"]
    return max(own, error({"softcap": 0.0, "sinks": None, **operands}, out, shapes))


def logits_of(operands: Operands, shapes: Shapes) -> Tensor:
    """[B, K, G, P] float64 of what the storage holds now, without a cap."""
    keys = operands["keys"].view(shapes.batch, shapes.kv_heads, shapes.slots, -1).double()
    folded = operands["query"].double().view(shapes.batch, shapes.kv_heads, -1, shapes.dim)
    return folded @ keys.transpose(2, 3) * operands["scale"]


def attention(operands: Operands, shapes: Shapes) -> Tensor:
    """[B, H, 1, Dv] float64 of what the storage holds now."""
    sinks = operands["sinks"]
    values = operands["values"].view(shapes.batch, shapes.kv_heads, shapes.slots, -1).double()
    logits = soft_capped(logits_of(operands, shapes), operands["softcap"])
    if sinks is not None:  # a column of a value that is zero
        column = sinks.double().view(1, shapes.kv_heads, -1, 1).expand(shapes.batch, -1, -1, -1)
        logits = torch.cat([logits, column], -1)
    return (logits.softmax(-1)[..., : shapes.slots] @ values).view(shapes.batch, -1, 1, shapes.value_dim)
