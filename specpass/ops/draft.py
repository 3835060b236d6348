"""A draft's next token, and the prompt looked up in its place, in plain aten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import draft as dialect
from specpass.ops.bind import bind

DIVERSITY = 0.5  # nats: of 0.2 to 0.8, which serve most tasks (arXiv 1610.02424)
LONGEST = 8  # tokens of the n-gram that is looked up first: three are alike in many lines of a log or a table


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


def next_tokens(
    logits: Tensor, ended: Tensor, futures: int, vocab: int, eos_ids: list[int], pad_id: int
) -> tuple[Tensor, Tensor]:
    """The next token of each of M branches: the likeliest by log-probability less 0.5 for each earlier branch's choice.

    Diverse beam search with groups of one beam and a Hamming penalty (arXiv 1610.02424): branch 0 is greedy, and
    branch m leaves a token that n branches in front of it take at this step where the next is less than 0.5 n behind.

    Args: logits [B * M, q, V], a row's branches side by side; the last of q is read, ids >= vocab are masked out; ended
    [B * M] bool.
    Returns: ids [B * M, 1] int64 (pad_id where the branch had ended, which keeps no other from it), ended [B * M] bool.
    """
    last = logits[:, -1, :vocab].float().unflatten(0, (-1, futures))
    over = ended.unflatten(0, (-1, futures))
    penalty, chosen = torch.zeros_like(last[:, 0]), []
    for branch in range(futures):
        token = torch.argmax(last[:, branch] - penalty, dim=-1, keepdim=True)
        chosen.append(token)
        taken = torch.logical_not(over[:, branch, None]).to(penalty.dtype)
        penalty = penalty.scatter_add(1, token, DIVERSITY * taken)
    ids = torch.stack(chosen, 1).flatten(0, 1)
    ids = ids.masked_fill(ended[:, None], pad_id)
    for eos in eos_ids:
        ended = ended | (ids[:, 0] == eos)
    return ids, ended


def prompt_lookup(ids: Tensor, lengths: Tensor, length: int) -> Tensor:
    """The L tokens that followed the latest earlier occurrence of each row's last n tokens, for the largest n <= 8.

    An occurrence near the row's end is followed by fewer than L tokens: what follows them is what was copied, so that a
    row which repeats itself goes on repeating. Where not even the last token stood before, it is repeated, and asks
    about what the window's last row asks. Source: prompt lookup decoding (Saxena 2023), as in transformers'
    prompt_lookup_num_tokens, which takes no candidates there.

    Args: ids [B, S] packed; lengths [B]. Returns: [B, L] int64.
    """
    size = ids.shape[1]
    column, last = torch.arange(size, device=ids.device)[None, :], (lengths - 1)[:, None]
    equal = column < last  # so far, the n-gram that ends in a column is the row's last
    found = torch.zeros_like(ids, dtype=torch.int64)  # the longest such n
    for back in range(LONGEST):
        own = ids.gather(1, (last - back).clamp(min=0))
        equal = equal & (column >= back) & (F.pad(ids, (back, 0))[:, :size] == own)
        found = found + equal.to(torch.int64)
    best = (found * size + column).argmax(1, keepdim=True)  # the longest, of these the latest
    period = torch.where(found.gather(1, best) > 0, last - best, 1)
    index = lengths[:, None] - period + torch.arange(length, device=ids.device) % period
    return ids.gather(1, index.clamp(min=0)).to(torch.int64)


bind(dialect.NextToken, next_token)
bind(dialect.NextTokens, next_tokens)
bind(dialect.PromptLookup, prompt_lookup)
