"""What a kernel is specialised for: sizes that are constants of the compiled graph."""

from __future__ import annotations

import dataclasses
from typing import Any

DTYPES = {"float32": ("fp32", 4), "float16": ("fp16", 2), "bfloat16": ("bf16", 2)}  # name -> Triton's name, bytes


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of one attention site; 0 where a kernel has no such size.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        batch, kv_heads, group, dim, value_dim: B, K, G, D, Dv.
        rows, window: R = W + L query rows that score, W.
        budget, room: C, N.
        columns: T, rounded up to a power of two: prompts differ, and tiles are chosen for their order of magnitude.
        reduce: "max", "mean" or "sum". weighted: whether each query row counts by a weight of its own.
        softcap: logits are softcap * tanh(logits / softcap), 0 for none. sinks: whether each query head has a logit
        that belongs to no key. ragged: whether KV heads have budgets of their own, whose mean is the budget.
        bits: of a quantised prompt, for kernels that read one.
    """

    dtype: str
    batch: int
    kv_heads: int
    group: int
    dim: int
    value_dim: int
    rows: int = 0
    window: int = 0
    budget: int = 0
    room: int = 0
    columns: int = 0
    reduce: str = "max"
    weighted: bool = False
    softcap: float = 0.0
    sinks: bool = False
    ragged: bool = False
    bits: int = 8

    @property
    def slots(self) -> int:
        """P = C + N."""
        return self.budget + self.room

    @property
    def heads(self) -> int:
        """B * K: the programs of one tile or split."""
        return self.batch * self.kv_heads

    @property
    def members(self) -> int:
        """M = G * R: query rows that share a KV head."""
        return self.group * self.rows

    @property
    def triton_dtype(self) -> str:
        return DTYPES[self.dtype][0]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def block_of(dim: int) -> int:
    """Columns of a tile that holds `dim`: tl.arange wants a power of two, and a dot at least 16."""
    return power_of_two(dim, 16)


def constant(size: Any) -> int:
    """A size of a tensor; 0 where it is a symbol (batch, prompt length), which decides nothing."""
    return size if isinstance(size, int) else 0


def dtype_of(tensor: Any) -> str:
    """ "bfloat16" of a tensor of torch.bfloat16."""
    return name_of(tensor.dtype)


def name_of(dtype: Any) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
