"""Products in float32 where a CPU has no instructions for the dtype: torch multiplies bfloat16 and float16 there
several times slower, but in flash attention.

Operands become float32 block by block, so that no second copy of a weight is held, and results are rounded once.
`python -m bench.wide_products` times it beside torch's products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.kernels.cpu.isa import multiplies

FEATURES, ROWS = 512, 1024  # of a product: beyond, float32 copies take more memory and no less time


def is_slow(states: Tensor) -> bool:
    """Whether torch's products of such a tensor, real or fake, take several times those of float32."""
    return states.device.type == "cpu" and not multiplies(states.dtype)


def widened(states: Tensor) -> Tensor:
    """In float32 what is slow, others as they are."""
    return states.float() if is_slow(states) else states


def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    """F.scaled_dot_product_attention, in float32 where that is faster; [B, H, q, Dv] of the query's dtype.

    Torch's flash attention multiplies in float32 itself; values of another width than keys it does not serve.
    """
    if query.shape[3] == value.shape[3]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **how)
    wide = widened(query)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(wide.dtype)
    out = F.scaled_dot_product_attention(wide, widened(key), widened(value), attn_mask=attn_mask, **how)
    return out.to(query.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias in float32, rounded to x's dtype: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    rows, weight = x.detach().reshape(-1, x.shape[-1]), weight.detach()  # who wants gradients is told by read_prompt
    (count, inner), features = rows.shape, weight.shape[0]
    out = x.new_empty(count, features)
    blocks = torch.empty(min(FEATURES, features), inner), torch.empty(min(ROWS, count), inner)
    products = torch.empty(blocks[0].shape[0] * blocks[1].shape[0])
    for first in range(0, features, FEATURES):
        some = slice(first, min(first + FEATURES, features))
        own = blocks[0][: some.stop - first].copy_(weight[some])
        added = None if bias is None else bias.detach()[some].float()
        for start in range(0, count, ROWS):
            block = rows[start : start + ROWS]
            product = products[: block.shape[0] * own.shape[0]].view(block.shape[0], -1)
            torch.mm(blocks[1][: block.shape[0]].copy_(block), own.t(), out=product)
            out[start : start + ROWS, some] = product if added is None else product.add_(added)
    return out.view(*x.shape[:-1], features)
