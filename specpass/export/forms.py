"""One plain ATen form for each operator that a PRUNED graph may hold.

Nearly all are the references themselves. `gather_kv` (here without free slots: the runtime owns the room) and
`append_kv` write into tensors, which ONNX cannot say; attention is spelled so that ONNX Runtime copies no keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specpass.kernels import reference, reference_prompt


def by_head(storage: Tensor, kv_heads: int) -> Tensor:
    """[B, K * P, D] as [B, K, P, D]; unflatten(1, (K, -1)) would turn a symbolic P into a number."""
    batch, slots, dim = storage.shape
    return storage.reshape(batch, kv_heads, slots // kv_heads, dim)


def write_slots(storage: Tensor, lengths: Tensor, new: Tensor) -> Tensor:
    """Storage [B, K, P, D] with new [B, K, q, D] at the slots that start at lengths [B, K]."""
    slot = (lengths[:, :, None] + torch.arange(new.shape[2], device=new.device))[..., None]
    return storage.scatter(2, slot.expand(-1, -1, -1, new.shape[3]), new)


def gather_kv(key: Tensor, value: Tensor, positions: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference for room 0."""
    if room:
        raise ValueError(f"room={room}: an exported prefill has no free slots")
    index = positions.clamp(min=0)[..., None]
    unused = (positions < 0)[..., None]

    def compact(states: Tensor) -> Tensor:
        kept = states.gather(2, index.expand(-1, -1, -1, states.shape[3]))
        return kept.masked_fill(unused, 0).flatten(1, 2)

    return compact(key), compact(value), (positions >= 0).sum(-1)


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """As the reference: one product per member of the GQA group, so that one member's [B, K, T, T] is held."""
    members = query.unflatten(1, (key.shape[1], -1)).unbind(2)
    column = torch.arange(key.shape[2], device=key.device)
    later = (column > column[:, None])[None, None]
    if softcap or sinks is not None:
        return reference.modified_attention(query, key, value, ~later, scale, softcap, sinks)
    outs = [attention(member, key, value, later, scale) for member in members]
    return outs[0] if len(outs) == 1 else torch.stack(outs, 2).flatten(1, 2)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference."""
    if softcap or sinks is not None:
        return reference.attend(query, keys, values, lengths, scale, softcap, sinks)
    batch, heads, count, dim = query.shape
    group = heads // keys.shape[1]
    unread = ~reference.slots_read(lengths, count, keys.shape[2], group)
    folded = query.reshape(batch, keys.shape[1], group * count, dim)
    return attention(folded, keys, values, unread, scale).reshape(batch, heads, count, values.shape[3])


def attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v without what is `hidden`; every row sees something.

    torch.onnx's form of scaled_dot_product_attention turns and scales all keys, and so copies the cache at each step;
    ONNX Runtime multiplies by turned keys where they lie.
    """
    logits = torch.matmul(query * scale, key.transpose(2, 3))
    bias = torch.where(hidden, float("-inf"), 0.0).to(logits.dtype)
    return torch.matmul(torch.softmax(logits + bias, -1), value)


def pack_order(attention_mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return reference.pack_order(attention_mask)


def full_lengths(ids: Tensor) -> Tensor:
    return torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64, device=ids.device)


_SAME = (
    "pack_ids",
    "append_ids",
    "append_positions",
    "take_positions",
    "unpack_index",
    "score_rows",
    "take_rows",
    "importance",
    "select",
    "select_recent",
    "keep_all",
    "keep_kv",
    "next_token",
)
_SAME_PROMPT = (
    "row_weights",
    "no_scores",
    "merge_layer",
    "merge_step",
    "select_prompt",
    "take_ids",
    "count_kept",
    "number_anew",
    "map_positions",
    "told_positions",
    "keep_short_rows",
)

FORMS: dict[str, Callable[..., Any]] = {
    **{name: getattr(reference, name) for name in _SAME},
    **{name: getattr(reference_prompt, name) for name in _SAME_PROMPT},
    "write_slots": write_slots,
    "gather_kv": gather_kv,
    "prefill_attention": prefill_attention,
    "attend": attend,
    "pack_order": pack_order,
    "full_lengths": full_lengths,
}
