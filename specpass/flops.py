"""FLOP formulas of specpass's operators for torch.utils.flop_counter, which sees only the whole operator.

Counted as torch counts scaled_dot_product_attention: two per multiply-add, the causal half in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

import specpass.ops  # noqa: F401  (defines the operators)

SPEC = torch.ops.specpass


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """query [B, H, q, D], key [B, K, P, D], value [B, K, P, Dv]: scores and their product with V, for all H heads."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * (dim + value[3])


def append_flops(keys: Any, values: Any, lengths: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """keys [B, K * P, D], values [B, K * P, Dv], query [B, H, 1, D], key [B, K, 1, D]: as attention over P slots."""
    batch, kv_heads = key[:2]
    slots = keys[1] // kv_heads
    return attention_flops(query, (batch, kv_heads, slots, keys[2]), (batch, kv_heads, slots, values[2]))


def importance_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """query [B, H, R, D], key [B, K, T, D]: one product."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * dim


def register() -> None:
    """Tell torch's counter; once a process."""
    for operator, formula in (
        (SPEC.attend, attention_flops),
        (SPEC.prefill_attention, attention_flops),
        (SPEC.prefill_attention_lse, attention_flops),
        (SPEC.modified_attention, attention_flops),
        (SPEC.append_attend, append_flops),
        (SPEC.importance, importance_flops),
    ):
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)


register()
