"""Attention that a model spells out (attn_implementation="eager") becomes one operator.

before: `matmul(softmax(matmul(q, transpose(k)) * s + mask), v)`                      -> sdpa(q, k, v, mask, scale=s)
        the same with the mask in front of the scale (CodeGen), with `where(allowed, logits, lowest)` under the mask
        (GPT-Neo), with q and k cast to float32 (GPT-J), which products of 16-bit numbers are summed in anyway
        the same with a bias beside the mask (Bloom, whose heads folded.py has unfolded), or with
        `masked_fill(logits + bias, hidden, lowest)` (MPT)
        the same with `c * tanh(logits / c)` under the mask (Gemma 2), or with one more column of logits that is cut off
        behind the softmax (sinks, gpt-oss)                   -> modified_attention(q, k, v, mask, s, c, sinks [H])
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from specpass.dialect.cache import Fill, KeepKv
from specpass.dialect.define import SPEC
from specpass.graph.aten import (
    Add,
    Cat,
    Expand,
    Factor,
    Largest,
    MaskedFill,
    Matmul,
    Passive,
    Slice,
    Softmax,
    Sub,
    Tanh,
    Transpose,
    View,
    Where,
)
from specpass.graph.edit import Editor
from specpass.graph.operands import GetItem, Operands
from specpass.graph.walk import ATEN, value

LAST = (-1, 3)  # the last of four axes


@dataclasses.dataclass
class Logits:
    """What a softmax is taken of: query [B, H, q, D] and key [B, H, T, D] nodes and what happens to their product.

    `masks` are added, times `mask_scale`; bare logits are replaced where not `allowed`, their sum where `hidden`.
    """

    query: fx.Node
    key: fx.Node
    masks: tuple[fx.Node, ...]
    mask_scale: float
    allowed: Where | None
    hidden: MaskedFill | None
    scale: float
    softcap: float
    sinks: fx.Node | None


Masks = dict[tuple[Any, ...], "fx.Node | None"]


def fuse_eager_attention(editor: Editor, softmax: Softmax, masks: Masks) -> None:
    """Put the operator in place of each product of this softmax with values, where all of it is understood.

    Args: masks: those made so far; layers share theirs.
    """
    logits = read_logits(softmax.input) if softmax.dim in LAST else None
    if logits is None:
        return
    weights: fx.Node = softmax.node
    if logits.sinks is not None:
        cut = [user for user in weights.users if drops_last(Slice.match(user))]
        if len(cut) != 1 or len(weights.users) != 1:
            return
        weights = cut[0]
    while len(weights.users) == 1 and Passive.is_call(next(iter(weights.users))):
        weights = next(iter(weights.users))
    for user in list(weights.users):
        product = Matmul.match(user)
        if product is not None and product.input is weights:
            editor.replace(user, one_operator(editor, logits, product, masks))
    while weights is not softmax.node and not weights.users:  # dropout that is off counts as impure, and would stay
        dead, weights = weights, weights.all_input_nodes[0]
        editor.graph.erase_node(dead)


def drops_last(cut: Slice | None) -> bool:
    """x[..., :-1]"""
    return cut is not None and cut.dim in LAST and (cut.start, cut.end) == (0, -1)


def one_operator(editor: Editor, logits: Logits, product: Matmul, masks: Masks) -> fx.Node:
    """The operator in front of a product of weights with values."""
    place: dict[str, Any] = {"before": product.node, "like": product.node}
    query, key = (without_cast(node, value(product.other).dtype) for node in (logits.query, logits.key))
    of_mask = (logits.masks, logits.mask_scale, logits.allowed, logits.hidden)
    name = tuple(part.node if isinstance(part, Operands) else part for part in of_mask)
    if name not in masks:
        masks[name] = one_mask(editor, logits, place)
    tensors = (query, key, product.other, masks[name])
    if logits.softcap or logits.sinks is not None:
        return editor.call(SPEC.modified_attention, *tensors, logits.scale, logits.softcap, logits.sinks, **place)
    sdpa = editor.call(ATEN.scaled_dot_product_attention, *tensors, **place)
    sdpa.kwargs = {"scale": logits.scale}
    return sdpa


def one_mask(editor: Editor, logits: Logits, place: dict[str, Any]) -> fx.Node | None:
    """All that is done to the logits' columns, as one mask that is added."""
    mask, allowed, hidden = None, logits.allowed, logits.hidden
    for added in logits.masks:
        own = editor.call(ATEN.unsqueeze, added, 0, **place) if value(added).dim() == 3 else added
        mask = own if mask is None else editor.call(ATEN.add.Tensor, mask, own, **place)
    if mask is not None and logits.mask_scale != 1.0:
        mask = editor.call(ATEN.mul.Tensor, mask, logits.mask_scale, **place)
    if allowed is not None:
        if mask is None:
            mask = editor.call(ATEN.zeros_like, allowed.other, **place)
        mask = editor.call(ATEN.where.self, allowed.condition, mask, allowed.other, **place)
    if hidden is not None and mask is None:
        return editor.call(ATEN.where.Scalar, hidden.mask, float(hidden.value), 0.0, **place)
    if hidden is not None:
        return editor.call(ATEN.masked_fill.Scalar, mask, hidden.mask, hidden.value, **place)
    return mask


def without_cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """x of dtype `dtype` of `x.to(wider)`, or the node; not further back than what the cache was given."""
    plain = node
    while (passive := Passive.match(plain)) is not None and not any(
        Fill.is_call(u) or KeepKv.is_call(u) for u in plain.users
    ):
        plain = passive.input
    return plain if value(plain).dtype == dtype else node


def read_logits(node: fx.Node) -> Logits | None:
    """Parse from the softmax back to the product; None where a step is unknown."""
    node, sinks = without_sinks(skip(node))
    node = skip(node)
    hidden = MaskedFill.match(node)
    if hidden is not None:
        if not isinstance(hidden.value, (int, float)):
            return None
        node = skip(hidden.input)
    bare, late = without_factor(node)
    inner, masks = without_masks(bare)
    if not masks:  # the factor is the product's own, or the cap's
        inner, late = node, 1.0
    allowed = Where.match(inner)
    if allowed is not None:
        inner = skip(allowed.input)
    inner, softcap = without_cap(inner)
    inner, scale = without_factor(inner)
    product = Matmul.match(inner)
    turned = None if product is None else Transpose.match(product.other)
    if product is None or turned is None or {turned.dim0, turned.dim1} not in ({2, 3}, {-1, -2}):
        return None
    if value(product.input).dim() != 4 or not all(covers(mask, value(product.input).shape[1]) for mask in masks):
        return None
    if late != 1.0 and softcap:
        return None
    return Logits(product.input, turned.input, masks, late, allowed, hidden, scale * late, softcap, sinks)


def covers(mask: fx.Node, heads: int) -> bool:
    """Whether it is [B, 1 or H, q, T], or [H, q, T]."""
    shape = value(mask).shape
    return len(shape) == 4 or (len(shape) == 3 and shape[0] == heads)


def skip(node: fx.Node) -> fx.Node:
    """Step over casts, copies and inactive dropout."""
    while (passive := Passive.match(node)) is not None:
        node = passive.input
    return node


def without_masks(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """x and the masks of `x + bias + mask`, as many as there are."""
    masks: list[fx.Node] = []
    while (total := Add.match(node)) is not None and all(
        isinstance(part, fx.Node) for part in (total.input, total.other)
    ):
        masks.insert(0, total.other)
        node = skip(total.input)
    return node, tuple(masks)


def without_factor(node: fx.Node) -> tuple[fx.Node, float]:
    """x and s of `x * s` or `x / (1 / s)`; 1.0 where no number multiplies."""
    factor = Factor.match(node)
    if factor is None or not isinstance(factor.other, (int, float)):
        return node, 1.0
    number = float(factor.other)
    return skip(factor.input), number if Factor.multiplies(node) else 1.0 / number


def without_cap(node: fx.Node) -> tuple[fx.Node, float]:
    """x and c of `c * tanh(x / c)`; 0.0 where there is no such cap."""
    inner, cap = without_factor(node)
    capped = Tanh.match(inner)
    if capped is None:
        return node, 0.0
    inner, share = without_factor(skip(capped.input))
    return (inner, cap) if abs(cap * share - 1.0) < 1e-6 else (node, 0.0)


def without_sinks(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """x and sinks [H] of `cat([x, expand(reshape(sinks))])`, with or without its rows' maximum taken off."""
    less, joined = Sub.match(node), Cat.match(node)
    if less is not None and largest_of(less.other) is less.input:
        joined = Cat.match(skip(less.input))
    if joined is None or joined.dim not in LAST or len(joined.tensors) != 2:
        return node, None
    logits, column = joined.tensors
    sinks = skip(column)
    while (wide := Expand.match(sinks) or View.match(sinks)) is not None:
        sinks = skip(wide.input)
    width, heads = value(column).shape[-1], value(logits).shape[1]
    return (logits, sinks) if width == 1 and tuple(value(sinks).shape) == (heads,) else (node, None)


def largest_of(node: fx.Node) -> fx.Node | None:
    """x of `x.max(-1, keepdim=True).values` or `x.amax(-1, True)`."""
    item = GetItem.match(node)
    if item is not None and item.index == 0:
        node = item.source
    largest = Largest.match(node)
    return None if largest is None or largest.dim not in (*LAST, [-1], [3]) else largest.input
