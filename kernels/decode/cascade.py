"""Attention of several sequences of one prompt in two parts: the prompt's slots, read once for all of them, and each
sequence's own; log-sum-exps make one softmax of both (Hydragen, arXiv 2402.05099; cascade attention in vLLM).

Symbols: B prompts, n sequences of each, R = B * n rows, H query heads, K KV heads, G = H / K, q new tokens, C slots of
a prompt, N of a sequence, D and Dv head dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specpass.kernels.attention import first_read, soft_capped

Part = Sequence[Tensor]  # attention [.., M, Dv] over some slots, and its natural log-sum-exp [.., M] float32


def attend_cascade(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    prompt: Sequence[Tensor],
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    layers: int = 1,
) -> Tensor:
    """Budgeted attention of q new queries; a prompt's n sequences lie in the rows of one query.

    Args: query [R, H, q, D]; keys [R, K, N, D], values [R, K, N, Dv], lengths [R, K] with the q new slots counted: each
    sequence's own; prompt: keys [B, K, C, D], values [B, K, C, Dv], counts [B, K], or of heads with budgets of their
    own keys [B, T, D], values [B, T, Dv], counts and starts [B, K]; rows b * n .. b * n + n - 1 are prompt b's. The
    others: as in `attend`, in slots, of which the prompt's come first.
    Returns: [R, H, q, Dv]; query i reads the prompt, and its own slots below lengths - (q - 1 - i).
    """
    rows, heads, count = query.shape[:3]
    prompt_keys, prompt_values, counts, *starts = prompt
    prompts, kv_heads = counts.shape
    group, each = heads // kv_heads, rows // prompts
    folded = query.reshape(rows, kv_heads, group * count, -1)
    together = folded.unflatten(0, (prompts, each)).transpose(1, 2).flatten(2, 3)  # [B, K, n * G * q, D]
    spread = counts.repeat_interleave(each, 0)  # [R, K]
    ahead = torch.arange(count - 1, -1, -1, device=query.device)
    limit = (spread + lengths)[..., None] - ahead  # [R, K, q] slots in front of what a query may not read
    first = first_read(limit - 1, sliding, chunk)[..., None] if sliding or chunk else None  # [R, K, q, 1]
    if starts:
        assert first is None, "such heads read the whole prompt"
        theirs = part_of_heads(together, prompt_keys, prompt_values, counts, starts[0], scale, softcap)
    else:
        slot = torch.arange(prompt_keys.shape[2], device=query.device)
        mask = (slot < counts[..., None])[:, :, None]  # [B, K, 1, C]
        if first is not None:
            read = (slot >= first).unflatten(0, (prompts, each)).transpose(1, 2)  # [B, K, n, q, C]
            mask = (mask[:, :, None] & read)[:, :, :, None].expand(-1, -1, -1, group, -1, -1).flatten(2, 4)
        theirs = part(together, prompt_keys, prompt_values, mask, scale, softcap)
    if not query.is_cuda:  # nobody waits for these numbers
        used = int(lengths.max())
        keys, values = keys[:, :, :used], values[:, :, :used]
    own = (torch.arange(keys.shape[2], device=query.device) + spread[..., None])[:, :, None]  # [R, K, 1, N]
    mask = own < limit[..., None] if first is None else (own < limit[..., None]) & (own >= first)  # [R, K, q, N]
    if count > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)  # [R, K, G * q, N]
    mine = part(folded, keys, values, mask, scale, softcap)
    out, lse = merged([states.unflatten(2, (each, -1)).transpose(1, 2).flatten(0, 1) for states in theirs], mine)
    out, lse = out.reshape(rows, heads, count, -1), lse.reshape(rows, heads, count)
    if sinks is not None:  # each row scaled by the share that its sink leaves
        out = out * torch.sigmoid(lse - sinks.float()[:, None])[..., None]
    return out.to(query.dtype)


def merged(one: Part, other: Part) -> Part:
    """Attention over two sets of slots as one, in float32; one of the two may be empty."""
    (out, lse), (more, behind) = one, other
    total = torch.logaddexp(lse, behind)
    return out.float() * (lse - total).exp()[..., None] + more.float() * (behind - total).exp()[..., None], total


def part(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Part:
    """Attention of query [B, K, M, D] over some slots of [B, K, T, D]; rows that read none of them have -inf.

    Args: mask: bool [B, K, 1 or M, T].
    """
    if not (query.is_cuda or softcap) and keys.shape[3] == values.shape[3]:
        return part_by_flash(query, keys, values, mask, scale)
    logits = soft_capped(product(query, keys.transpose(2, 3)) * scale, softcap).masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return product(weights.to(values.dtype), values), lse


def part_of_heads(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, starts: Tensor, scale: float, softcap: float
) -> Part:
    """The same over [B, T, D], of which head k's slots are `counts` [B, K] from `starts` [B, K] on."""
    out = query.new_empty(*query.shape[:3], values.shape[2], dtype=torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if query.is_cuda:  # which waits for no number: masks say which slots are a head's own
        slot = torch.arange(keys.shape[1], device=keys.device) - starts[..., None]
        owned = ((slot >= 0) & (slot < counts[..., None]))[:, :, None]  # [B, K, 1, T]
        for head in range(counts.shape[1]):
            own = slice(head, head + 1)
            found = part(query[:, own], keys[:, None], values[:, None], owned[:, own], scale, softcap)
            out[:, own], lse[:, own] = found
        return out, lse
    for row in range(len(counts)):
        for head, (start, used) in enumerate(zip(starts[row].tolist(), counts[row].tolist(), strict=True)):
            place, at = slice(start, start + used), (slice(row, row + 1), slice(head, head + 1))
            states = keys[row, place][None, None], values[row, place][None, None]
            out[at], lse[at] = part(query[at], *states, torch.ones(1, 1, 1, used, dtype=torch.bool), scale, softcap)
    return out, lse


def part_by_flash(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Part:
    """The same, by aten's flash attention for CPUs."""
    if bool(mask.all()):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, scale=scale)
        return out, lse
    hidden = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=hidden, scale=scale
    )
    return out, lse.masked_fill(~mask.any(-1), float("-inf"))  # of nothing it says 0


def product(a: Tensor, b: Tensor) -> Tensor:
    """[B, K, M, T] float32 of [B, K, M, D] and [B, K, D, T]: CUDA keeps the sums of 16-bit products as they are."""
    if a.dtype == torch.float32:
        return torch.matmul(a, b)
    if a.is_cuda:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return torch.matmul(a.float(), b.float())
