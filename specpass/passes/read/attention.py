"""Attention that a model spells out (attn_implementation="eager") becomes one operator.

before: `matmul(softmax(matmul(q, transpose(k)) * s + mask), v)`                      -> sdpa(q, k, v, mask, scale=s)
        the same with `c * tanh(logits / c)` under the mask (Gemma 2), or with one more column of logits that is cut off
        behind the softmax (sinks, gpt-oss)                   -> modified_attention(q, k, v, mask, s, c, sinks [H])
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, VIEWS, is_op, value

PASSIVE = (ATEN.to, ATEN._to_copy, ATEN.dropout, ATEN.contiguous, ATEN.clone)  # casts, dropout that is off, copies


@dataclasses.dataclass
class Logits:
    """What a softmax is taken of: query [B, H, q, D] and key [B, H, T, D] nodes and what happens to their product."""

    query: fx.Node
    key: fx.Node
    mask: fx.Node | None
    scale: float
    softcap: float
    sinks: fx.Node | None


def fuse_eager_attention(editor: Editor, softmax: fx.Node) -> None:
    """Put the operator in place of each product of this softmax with values, where all of it is understood."""
    if softmax.args[1] not in (-1, 3):
        return
    logits = read_logits(softmax.args[0])
    if logits is None:
        return
    weights: fx.Node = softmax
    if logits.sinks is not None:
        cut = [
            user
            for user in softmax.users
            if is_op(user, ATEN.slice) and tuple(user.args[1:4]) in ((-1, 0, -1), (3, 0, -1))
        ]
        if len(cut) != 1 or len(softmax.users) != 1:
            return
        weights = cut[0]
    while len(weights.users) == 1 and is_op(next(iter(weights.users)), *PASSIVE):
        weights = next(iter(weights.users))
    for user in list(weights.users):
        if is_op(user, ATEN.matmul) and user.args[0] is weights:
            editor.replace(user, one_operator(editor, logits, user))


def one_operator(editor: Editor, logits: Logits, product: fx.Node) -> fx.Node:
    place: dict[str, Any] = {"before": product, "like": product}
    tensors = (logits.query, logits.key, product.args[1], logits.mask)
    if logits.softcap or logits.sinks is not None:
        return editor.call(SPEC.modified_attention, *tensors, logits.scale, logits.softcap, logits.sinks, **place)
    sdpa = editor.call(ATEN.scaled_dot_product_attention, *tensors, **place)
    sdpa.kwargs = {"scale": logits.scale}
    return sdpa


def read_logits(node: Any) -> Logits | None:
    """Parse from the softmax back to the product; None where a step is unknown."""
    node, sinks = without_sinks(skip(node))
    node, mask = skip(node), None
    if is_op(node, ATEN.add) and all(isinstance(arg, fx.Node) for arg in node.args):
        node, mask = skip(node.args[0]), node.args[1]
    node, softcap = without_cap(node)
    node, scale = without_factor(node)
    if not is_op(node, ATEN.matmul):
        return None
    query, turned = node.args
    if not is_op(turned, ATEN.transpose) or set(turned.args[1:]) not in ({2, 3}, {-1, -2}):
        return None
    if value(query).dim() != 4 or (mask is not None and value(mask).dim() != 4):
        return None
    return Logits(query, turned.args[0], mask, scale, softcap, sinks)


def skip(node: Any) -> Any:
    """Step over casts, copies and inactive dropout."""
    while is_op(node, *PASSIVE):
        node = node.args[0]
    return node


def without_factor(node: Any) -> tuple[Any, float]:
    """x and s of `x * s` or `x / (1 / s)`; 1.0 where no number multiplies."""
    if is_op(node, ATEN.mul, ATEN.div) and isinstance(node.args[1], (int, float)):
        factor = float(node.args[1])
        return skip(node.args[0]), factor if is_op(node, ATEN.mul) else 1.0 / factor
    return node, 1.0


def without_cap(node: Any) -> tuple[Any, float]:
    """x and c of `c * tanh(x / c)`; 0.0 where there is no such cap."""
    inner, cap = without_factor(node)
    if not is_op(inner, ATEN.tanh):
        return node, 0.0
    inner, share = without_factor(skip(inner.args[0]))
    return (inner, cap) if abs(cap * share - 1.0) < 1e-6 else (node, 0.0)


def without_sinks(node: Any) -> tuple[Any, fx.Node | None]:
    """x and sinks [H] of `cat([x, expand(reshape(sinks))])`, with or without its rows' maximum taken off."""
    joined = node
    if is_op(node, ATEN.sub) and is_op(skip(node.args[0]), ATEN.cat) and largest_of(node.args[1]) is node.args[0]:
        joined = skip(node.args[0])
    if not is_op(joined, ATEN.cat) or joined.args[1:] not in ((-1,), (3,)) or len(joined.args[0]) != 2:
        return node, None
    logits, column = joined.args[0]
    sinks = skip(column)
    while is_op(sinks, ATEN.expand, *VIEWS):
        sinks = skip(sinks.args[0])
    width, heads = value(column).shape[-1], value(logits).shape[1]
    return (logits, sinks) if width == 1 and tuple(value(sinks).shape) == (heads,) else (node, None)


def largest_of(node: Any) -> Any:
    """x of `x.max(-1, keepdim=True).values` or `x.amax(-1, True)`."""
    if is_op(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]
    return node.args[0] if is_op(node, ATEN.max, ATEN.amax) and node.args[1] in (-1, 3, [-1], [3]) else None
