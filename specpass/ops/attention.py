"""Attention of a prefill and of decode steps, in plain aten, and as ONNX says it.

Symbols: B batch, T columns, H query heads, K KV heads, G = H / K, D and Dv head dimensions, q new tokens, P slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.bits import GROUP
from specpass.dialect import attention as dialect
from specpass.kernels.attention import biased, first_read, modified_attention
from specpass.kernels.cpu import decode, prefill
from specpass.kernels.cpu.wide import sdpa, widened
from specpass.kernels.decode import reference
from specpass.kernels.dispatch import choose, returns_lse
from specpass.ops.bind import bind

ROWS = 256  # query rows whose logits are held at once where no flash attention serves


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed rows: [B, H, T, D] x [B, K, T, D] -> [B, H, T, Dv]; needs no mask."""
    changed = bool(softcap or chunk) or bias is not None
    tiles = not (changed or on_cuda(query)) and prefill.refuse(query, key, value, scale) is None
    flash = tiles or (returns_lse(query, key, value) and (on_cuda(query) or not sliding))  # aten on a CPU: no window
    if changed or (not flash and (sliding or sinks is not None)):
        return rows_in_place(prefill_in_blocks(query, key, value, scale, softcap, sinks, sliding, chunk, bias))
    if sinks is not None:
        return rows_in_place(prefill_with_sinks(query, key, value, scale, sinks, sliding))
    if tiles or sliding:
        return rows_in_place(flash_with_lse(query, key, value, scale, sliding)[0])
    return rows_in_place(prefill_flash(query, key, value, scale))


def on_cuda(states: Tensor) -> bool:
    """Whether CUDA computes this: flash attention of 16-bit groups (see returns_lse), masks of a group in one call."""
    return states.is_cuda


def rows_in_place(out: Tensor) -> Tensor:
    """One memory format for every path, as the fake kernel says: [B, T, H, Dv] rows, which o_proj reads in place."""
    return out if out.transpose(1, 2).is_contiguous() else out.transpose(1, 2).contiguous().transpose(1, 2)


def prefill_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`prefill_attention` without a cap or sinks: K and V are never repeated to H heads.

    CUDA's flash and cuDNN attention read those of a group once. Elsewhere one call per member of the group, each on
    views: with enable_gqa a CPU takes 2.5 times as long, and what is left of CUDA (float32) repeats K and V.
    """
    batch, heads, columns = query.shape[:3]
    group = heads // key.shape[1]
    if group == 1 or (on_cuda(query) and returns_lse(query, key, value)):
        how = {"is_causal": True, "scale": scale, "enable_gqa": group > 1}
        return sdpa(query, key, value, **how)
    out = query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
    attention_of_groups(query, key, value, out, is_causal=True, scale=scale)
    return out


def prefill_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    sliding: int,
    chunk: int,
    bias: Tensor | None,
) -> Tensor:
    """`prefill_attention` for ROWS queries at a time over the columns that some of them reads: never [T, T] logits."""
    batch, heads, columns = query.shape[:3]
    out = query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
    column = torch.arange(columns, device=key.device)
    first = first_read(column, sliding, chunk)
    for start in range(0, columns, ROWS):
        rows = slice(start, min(start + ROWS, columns))
        seen = slice(max(start - sliding + 1, 0) if sliding else start // chunk * chunk if chunk else 0, rows.stop)
        mask = ((column[seen] <= column[rows, None]) & (column[seen] >= first[rows, None]))[None, None]
        block = query[:, :, rows], key[:, :, seen], value[:, :, seen]
        if bias is not None:
            mask = biased(mask, bias[:, :, None, seen])
        # scaled_dot_product_attention takes a mask that is added in the query's dtype alone.
        if softcap or sinks is not None or (bias is not None and query.dtype != torch.float32):
            asked, keys, values = map(widened, block)
            out[:, :, rows] = modified_attention(asked, keys, values, mask, scale, softcap, sinks)
        else:
            attention_of_groups(*block, out[:, :, rows], attn_mask=mask, scale=scale)
    return out


def attention_of_groups(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, attn_mask: Tensor | None = None, **how: Any
) -> None:
    """Attention into `out` [B, H, q, Dv]: one call for each member of the GQA group, on views, K and V never repeated.

    On CUDA masked rows are one call: the group lies in the query's rows, where each row has a mask of its own.

    Args: attn_mask [1, 1, q, T] or [B or 1, H, q, T]; how: further arguments of scaled_dot_product_attention.
    """
    group = query.shape[1] // key.shape[1]
    if on_cuda(query) and attn_mask is not None and group > 1:
        out.copy_(attention_folded(query, key, value, attn_mask, **how))
        return
    for member in range(group):
        own = attn_mask if attn_mask is None or attn_mask.shape[1] == 1 else attn_mask[:, member::group]
        out[:, member::group] = sdpa(query[:, member::group], key, value, attn_mask=own, **how)


def attention_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **how: Any) -> Tensor:
    """[B, H, q, Dv] of queries [B, H, q, D], asked as [B, K, G * q, D]; mask [1, 1, q, T] or [B or 1, H, q, T]."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    by_member = mask[:, :, None].expand(-1, -1, group, -1, -1) if mask.shape[1] == 1 else mask.unflatten(1, (-1, group))
    folded = query.unflatten(1, (kv_heads, group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=by_member.flatten(2, 3), **how)
    return out.unflatten(2, (group, -1)).flatten(1, 2)


def flash_on_cuda(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int = 0) -> tuple[Tensor, Tensor]:
    """`prefill_attention` of 16-bit tensors, with a window too: [B, H, T, D], and its log-sum-exp [B, H, T] float32.

    It reads K and V of a group once, without repeating them, and of a window no columns outside.
    """
    if not sliding:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[:2]
    columns, rows = query.shape[2], (states.transpose(1, 2) for states in (query, key, value))
    window = {"window_size_left": sliding - 1, "window_size_right": 0}
    out, lse = torch.ops.aten._flash_attention_forward(
        *rows, None, None, columns, columns, 0.0, True, False, scale=scale, **window
    )[:2]
    return out.transpose(1, 2), lse


def prefill_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor, sliding: int = 0
) -> Tensor:
    """`prefill_attention` with sinks [H]: flash attention, each row scaled by the share that its sink leaves."""
    out, lse = flash_with_lse(query, key, value, scale, sliding)
    return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(out.dtype)


def flash_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int = 0) -> tuple[Tensor, Tensor]:
    """`prefill_attention`, and the log-sum-exp that flash attention finds on its way.

    Args: query [B, H, T, D], key and value [B, K, T, D], 16-bit on CUDA; sliding: not by aten's for CPUs.
    Returns: [B, H, T, D]; lse [B, H, T] float32, natural.
    """
    if on_cuda(query):
        return flash_on_cuda(query, key, value, scale, sliding)
    if prefill.refuse(query, key, value, scale) is None:
        return prefill.prefill(query, key, value, scale, sliding)
    batch, heads, columns = query.shape[:3]
    group = heads // key.shape[1]
    out = query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, columns, dtype=torch.float32)
    for member in range(group):
        out[:, member::group], lse[:, member::group] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, member::group], key, value, 0.0, True, scale=scale
        )
    return out, lse


def prefill_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_with_lse` in the operator's memory format; lse [B, H, R] of rows [B, R] (-1 reads row 0)."""
    out, lse = flash_with_lse(query, key, value, scale)
    return rows_in_place(out), lse.gather(2, rows.clamp(min=0)[:, None].expand(-1, query.shape[1], -1))


def prefill_attention_onnx(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """As the reference: one product per member of the GQA group, so that one member's [B, K, T, T] is held."""
    members = query.unflatten(1, (key.shape[1], -1)).unbind(2)
    column = torch.arange(key.shape[2], device=key.device)
    hidden = column > column[:, None]
    if sliding or chunk:
        hidden |= column < first_read(column, sliding, chunk)[:, None]
    hidden = hidden[None, None]
    if bias is not None:
        return modified_attention(query, key, value, biased(~hidden, bias[:, :, None]), scale, softcap, sinks)
    if softcap or sinks is not None:
        return modified_attention(query, key, value, ~hidden, scale, softcap, sinks)
    outs = [attention_onnx(member, key, value, hidden, scale) for member in members]
    return outs[0] if len(outs) == 1 else torch.stack(outs, 2).flatten(1, 2)


def append_attend(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    offsets: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """As the reference."""
    kernel = choose("append_attend", dict(locals())).kernel
    states, changes = (keys, values, lengths, query, key, value, scale), (softcap, sinks, sliding, chunk, offsets)
    if kernel in decode.WAYS:
        return decode.append_attend(kernel, *states, *changes)[0]
    return reference.append_attend(*states, *changes, layers)


def append_attend_lse(
    keys: Tensor, values: Tensor, lengths: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    kernel = choose("append_attend_lse", dict(locals())).kernel
    if kernel in decode.WAYS:
        return decode.append_attend(kernel, keys, values, lengths, query, key, value, scale)
    return reference.append_attend_lse(keys, values, lengths, query, key, value, scale)


def attend_onnx(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding: int = 0,
    chunk: int = 0,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    layers: int = 1,
    quantized: list[Tensor] | None = None,
    bits: int = 0,
) -> Tensor:
    """As the reference."""
    assert offsets is None, "refused before anything is traced"
    assert quantized is None, "no exported cache is"
    if softcap or sinks is not None or bias is not None:
        return reference.attend(query, keys, values, lengths, scale, softcap, sinks, sliding, chunk, bias)
    batch, heads, count, dim = query.shape
    group = heads // keys.shape[1]
    unread = ~reference.slots_read(lengths, count, keys.shape[2], group, sliding, chunk)
    folded = query.reshape(batch, keys.shape[1], group * count, dim)
    return attention_onnx(folded, keys, values, unread, scale).reshape(batch, heads, count, values.shape[3])


def attention_onnx(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v without what is `hidden`; every row sees something.

    torch.onnx's form of scaled_dot_product_attention turns and scales all keys, and so copies the cache at each step;
    ONNX Runtime multiplies by turned keys where they lie.
    """
    logits = torch.matmul(query * scale, key.transpose(2, 3))
    bias = torch.where(hidden, float("-inf"), 0.0).to(logits.dtype)
    return torch.matmul(torch.softmax(logits + bias, -1), value)


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """query [B, H, q, D], key [B, K, P, D], value [B, K, P, Dv]: scores and their product with V, for all H heads."""
    batch, heads, rows, dim = query
    return 2 * batch * heads * rows * key[2] * (dim + value[3])


def attend_flops(
    query: torch.Size,
    keys: torch.Size,
    values: torch.Size,
    lengths: torch.Size,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Size | None = None,
    sliding: int = 0,
    chunk: int = 0,
    bias: torch.Size | None = None,
    offsets: torch.Size | None = None,
    layers: int = 1,
    quantized: list[torch.Size] | None = None,
    **_: Any,
) -> int:
    """keys [B, K, P, D]; or [B, T, D] of heads with budgets of their own, which have T / (K * layers) in the mean.

    Of a quantised prompt all n blocks of slots count; what makes numbers of their codes does not.
    """
    if quantized is not None:
        slots = keys[2] + quantized[0][2] * GROUP
        return attention_flops(query, (*keys[:2], slots, keys[3]), (*values[:2], slots, values[3]))
    if offsets is None:
        return attention_flops(query, keys, values)
    sizes = (keys[0], lengths[1], keys[1] // (lengths[1] * layers))
    return attention_flops(query, (*sizes, keys[2]), (*sizes, values[2]))


def append_flops(
    keys: torch.Size,
    values: torch.Size,
    lengths: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Size | None = None,
    sliding: int = 0,
    chunk: int = 0,
    offsets: torch.Size | None = None,
    layers: int = 1,
    **_: Any,
) -> int:
    """keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], query [B, H, 1, D]: as attention over P slots."""
    return attend_flops(query, keys, values, lengths, scale, offsets=lengths, layers=layers)


bind(dialect.ModifiedAttention, modified_attention, flops=attention_flops)
bind(dialect.PrefillAttention, prefill_attention, onnx=prefill_attention_onnx, flops=attention_flops)
bind(dialect.PrefillAttentionLse, prefill_attention_lse, flops=attention_flops)
bind(dialect.Attend, reference.attend, onnx=attend_onnx, flops=attend_flops)
bind(dialect.AppendAttend, append_attend, flops=append_flops)
bind(dialect.AppendAttendLse, append_attend_lse, flops=append_flops)
