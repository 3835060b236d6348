"""Quantising, and attention over what was quantised, in plain aten: readable, any device.

Symbols: as in specpass/bits.py; H query heads, G = H / K, N free slots behind the prompt's, q new queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.bits import GROUP, Layout, blocks_of
from specpass.kernels.attention import soft_capped, softmax_with_sinks

ROUNDS = 2  # of the power iteration


def layout_of(keys: Tensor, values: Tensor, bits: int) -> Layout:
    return Layout(bits, keys.shape[-1], values.shape[-1], keys.element_size())


def quantize_kv(
    keys: Tensor, values: Tensor, lengths: Tensor, slots: int, room: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer's pruned prompt in fewer bits, and the free slots behind it in a storage of their own.

    Args: keys [B, K * (C + N), D], values [B, K * (C + N), Dv]; lengths [B, K] slots in use, behind which N are free;
        slots: C. room: N, which the storage says itself.
    Returns: the free slots' keys [B, K * N, D], values and lengths [B, K], all 0; codes [B, K, n, bytes] uint8 (see
        specpass/bits.py); counts [B, K] of the slots that are quantised; basis [B, K, r, D + Dv], B^T of the low rank.
    """
    layout, heads = layout_of(keys, values, bits), lengths.shape[1]
    own = [states.unflatten(1, (heads, -1)) for states in (keys, values)]
    size = blocks_of(slots) * GROUP
    used = torch.arange(size, device=keys.device) < lengths[..., None]  # [B, K, n GROUP]
    codes = torch.zeros(*lengths.shape, blocks_of(slots), layout.block_bytes, dtype=torch.uint8, device=keys.device)
    basis = []
    for name, states in zip(("key", "value"), own, strict=True):
        prompt = F.pad(states[:, :, :slots], (0, 0, 0, size - slots)).float()
        basis.append(_quantize(codes, layout, name, prompt, used, keys.dtype))
    total = own[0].shape[2]
    behind = lengths[..., None] + torch.arange(total - slots, device=keys.device)
    place = (behind + total * torch.arange(heads, device=keys.device)[:, None]).flatten(1)[..., None]
    # No views: Dynamo would look at what they are views of, and trace anew for a storage that was widened.
    free = [states.gather(1, place.expand(-1, -1, states.shape[2])) for states in (keys, values)]
    return free[0], free[1], torch.zeros_like(lengths), codes, lengths.clone(), torch.cat(basis, -1)


def _quantize(codes: Tensor, layout: Layout, name: str, states: Tensor, used: Tensor, dtype: torch.dtype) -> Tensor:
    """Write keys or values [B, K, n GROUP, D] float32 into their fields: [B, K, r, D] in the model's dtype."""
    levels, axis = 2**layout.bits - 1, _axis(name)
    x, inside = _grouped(layout, name, states), _grouped(layout, name, used[..., None].expand_as(states))
    if layout.corrected:
        mean = x.masked_fill(~inside, 0).sum(axis, keepdim=True) / inside.sum(axis, keepdim=True).clamp(min=1)
        place = (x - mean).abs().masked_fill(~inside, -1.0).argmax(axis, keepdim=True)
        has = inside.gather(axis, place)
        inside = inside.scatter(axis, place, False)
    empty = ~inside.any(axis, keepdim=True)
    low = torch.where(inside, x, float("inf")).amin(axis, keepdim=True).masked_fill(empty, 0)
    high = torch.where(inside, x, float("-inf")).amax(axis, keepdim=True).masked_fill(empty, 0)
    zero = low.to(dtype)
    scale = ((high - zero.float()) / levels).to(dtype)
    step = scale.float()
    code = ((x - zero.float()) / torch.where(step > 0, step, 1.0)).round().clamp(0, levels)
    _put(codes, layout, f"{name}_scale", scale)
    _put(codes, layout, f"{name}_zero", zero)
    flat = _flat(code, name)
    width, planes = flat.shape[-1] * layout.bits // 8, 8 // layout.bits
    parts = flat.to(torch.uint8).unflatten(-1, (planes, width))
    shifts = torch.arange(planes, device=flat.device, dtype=torch.uint8)[:, None] * layout.bits
    _put(codes, layout, f"{name}_codes", (parts << shifts).sum(-2, dtype=torch.uint8))
    if not layout.corrected:
        return states.new_empty(*states.shape[:2], 0, states.shape[3], dtype=dtype)
    missing = (x - zero.float() - step * code).masked_fill(~inside, 0)
    factor, basis = low_rank(_flat(missing, name).flatten(2, 3), layout.rank)
    factor, basis = factor.to(dtype), basis.to(dtype)
    _put(codes, layout, f"{name}_factor", factor.unflatten(2, (-1, GROUP)))
    made = _grouped(layout, name, factor.float() @ basis.float())
    outlier = (x - zero.float() - step * code - made).gather(axis, place).masked_fill(~has, 0)
    _put(codes, layout, f"{name}_outlier", outlier.to(dtype))
    _put(codes, layout, f"{name}_place", place.to(torch.uint8))
    return basis


def low_rank(missing: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [.., C, r] and B^T [.., r, D] whose product is the best of rank r for missing [.., C, D], nearly.

    By power iteration from a start that is always the same, where GEAR starts from a random one: rows of a batch are to
    be quantised as they are alone.
    """
    dim = missing.shape[-1]
    index = torch.arange(dim * rank, device=missing.device, dtype=torch.float32).view(dim, rank)
    span = torch.cos(index * index + index).expand(*missing.shape[:-2], -1, -1)
    for _ in range(ROUNDS):
        span = torch.linalg.qr(missing.transpose(-1, -2) @ (missing @ span))[0]
    return missing @ span, span.transpose(-1, -2)


def dequantize(codes: Tensor, basis: Tensor, layout: Layout, name: str, dtype: torch.dtype) -> Tensor:
    """Keys or values of codes [B, K, n, bytes]: [B, K, n GROUP, D] float32; slots not in use hold no meaning.

    Args: basis [B, K, r, D + Dv]. name: "key" or "value". dtype: the model's.
    """
    packed = _get(codes, layout, f"{name}_codes", dtype)
    planes = 8 // layout.bits
    shifts = torch.arange(planes, device=codes.device, dtype=torch.uint8)[:, None] * layout.bits
    parts = (packed[..., None, :] >> shifts) & (2**layout.bits - 1)
    x = _grouped(layout, name, parts.flatten(-2).flatten(2, 3).float())
    scale, zero = (_get(codes, layout, f"{name}_{part}", dtype).float() for part in ("scale", "zero"))
    x = torch.addcmul(zero, x, scale)
    if layout.corrected:
        factor = _get(codes, layout, f"{name}_factor", dtype).float().flatten(2, 3)
        own = basis[..., : layout.dim] if name == "key" else basis[..., layout.dim :]
        x += _grouped(layout, name, factor @ own.float())
        place = _get(codes, layout, f"{name}_place", dtype).long()
        x.scatter_add_(_axis(name), place, _get(codes, layout, f"{name}_outlier", dtype).float())
    return _flat(x, name).flatten(2, 3)


def attend_quantized(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    codes: Tensor,
    counts: Tensor,
    basis: Tensor,
    bits: int,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q new queries over a quantised prompt and what stands behind it: [B, H, q, Dv].

    One layer's keys are made of their codes, then its values: more of the cache never exists dequantised.

    Args: query [B, H, q, D]; keys [B, K, N, D], values [B, K, N, Dv], lengths [B, K] with the q new slots counted: what
    stands behind the prompt; codes, counts, basis: as `quantize_kv` returns them; softcap, sinks: as
    `modified_attention`. Query i reads the prompt, and behind it the slots below lengths - (q - 1 - i).
    """
    batch, heads, count, dim = query.shape
    layout, kv_heads = layout_of(keys, values, bits), keys.shape[1]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * count, dim).float()
    prompt = folded @ dequantize(codes, basis, layout, "key", keys.dtype).transpose(2, 3)
    size = prompt.shape[3]
    logits = torch.cat([prompt, folded @ keys.float().transpose(2, 3)], -1) * scale
    slot = torch.arange(keys.shape[2], device=query.device)
    limit = lengths[..., None] - torch.arange(count - 1, -1, -1, device=query.device)  # [B, K, q]
    own = torch.arange(size, device=query.device) < counts[..., None]  # [B, K, n GROUP]
    mask = torch.cat([own[:, :, None].expand(-1, -1, count, -1), slot < limit[..., None]], -1)
    logits = soft_capped(logits, softcap).unflatten(2, (group, count)).masked_fill(~mask[:, :, None], float("-inf"))
    weights = softmax_with_sinks(logits, None if sinks is None else sinks.view(kv_heads, group, 1)).flatten(2, 3)
    out = weights[..., :size] @ dequantize(codes, basis, layout, "value", keys.dtype)
    out += weights[..., size:] @ values.float()
    return out.reshape(batch, heads, count, values.shape[3]).to(query.dtype)


def _axis(name: str) -> int:
    """Along which a group lies in what `_grouped` returns."""
    return -2 if name == "key" else -1


def _grouped(layout: Layout, name: str, states: Tensor) -> Tensor:
    """[B, K, n GROUP, D] as [B, K, n, GROUP, D], of values as [B, K, n, GROUP, groups, numbers of a group]."""
    states = states.unflatten(2, (-1, GROUP))
    return states if name == "key" else states.unflatten(-1, (layout.value_groups, layout.value_group))


def _flat(states: Tensor, name: str) -> Tensor:
    """[B, K, n, GROUP, D] of what `_grouped` returned."""
    return states if name == "key" else states.flatten(-2)


def _put(codes: Tensor, layout: Layout, name: str, states: Tensor) -> None:
    """Write a field [B, K, n, ...] of all blocks."""
    field = layout.fields[name]
    own = codes[..., field.start : field.end]
    (own if field.bytes else own.view(states.dtype)).unflatten(-1, field.shape).copy_(states)


def _get(codes: Tensor, layout: Layout, name: str, dtype: torch.dtype) -> Tensor:
    """A field [B, K, n, ...] of all blocks."""
    field = layout.fields[name]
    own = codes[..., field.start : field.end]
    return (own if field.bytes else own.view(dtype)).unflatten(-1, field.shape)
