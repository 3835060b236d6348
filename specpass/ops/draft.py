"""A draft's next token, in plain aten."""

from __future__ import annotations

import torch
from torch import Tensor

from specpass.dialect import draft as dialect
from specpass.ops.bind import bind


def _hash_uniform(seed: int, step: int, size: int, device: torch.device) -> Tensor:
    """[size] floats in (0, 1) from a counter: splitmix64's mixing of (seed, step, index), the same on any device."""
    start = ((seed * 1_000_003 + step) * 0x9E3779B9 + (1 << 63)) % (1 << 64) - (1 << 63)  # wraps to int64
    counter = torch.arange(size, dtype=torch.int64, device=device) + start
    mixed = counter * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    mixed = mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
    return ((mixed & 0xFFFFFFFFFFFF).double() + 0.5) / float(1 << 48)


def next_token(
    logits: Tensor, ended: Tensor, vocab: int, temperature: float, seed: int, step: int, eos_ids: list[int], pad_id: int
) -> tuple[Tensor, Tensor]:
    """The draft's next token of each row.

    Args: logits [B, M, V], the last of M is read, ids >= vocab are masked out; ended [B] bool. temperature 0.0 is
    greedy; above, Gumbel noise from a counter makes the draw depend on (seed, step) alone, not on the batch.
    Returns: ids [B, 1] int64 (pad_id where the row had ended), ended [B] bool.
    """
    last = logits[:, -1, :vocab]
    if temperature > 0:
        noise = -torch.log(-torch.log(_hash_uniform(seed, step, vocab, logits.device)))
        last = last.double() / temperature + noise
    ids = torch.argmax(last, dim=-1).masked_fill(ended, pad_id)
    for eos in eos_ids:
        ended = ended | (ids == eos)
    return ids[:, None], ended


bind(dialect.NextToken, next_token)
