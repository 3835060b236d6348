"""Attention of several sequences of one prompt: what it computes, and its FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specpass.dialect import cascade as dialect
from specpass.kernels.decode.cascade import attend_cascade
from specpass.ops.attention import attention_flops
from specpass.ops.bind import bind


def cascade_flops(
    query: torch.Size,
    keys: torch.Size,
    values: torch.Size,
    lengths: torch.Size,
    prompt: Sequence[torch.Size],
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Size | None = None,
    sliding: int = 0,
    chunk: int = 0,
    layers: int = 1,
    **_: Any,
) -> int:
    """As attention of every row over the C slots of its prompt, of ragged heads in the mean, and the N of its own."""
    slots = keys[2] + (prompt[0][2] if len(prompt) == 3 else prompt[0][1] // (keys[1] * layers))
    return attention_flops(query, torch.Size((*keys[:2], slots, keys[3])), torch.Size((*values[:2], slots, values[3])))


bind(dialect.AttendCascade, attend_cascade, flops=cascade_flops)
