"""Heads that a model folds into the batch ([B * H, q, D], Bloom) get an axis of their own, in the common spelling.

before: view(baddbmm(bias, view(q), transpose(view(k)), beta=b, alpha=a), [B, H, q, T]); view(bmm(view(p), view(v)))
after:  matmul(q, transpose(k)) * a + unflatten(bias) * b                              ; matmul(p, v)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from specpass.graph.aten import Baddbmm, Bmm, Transpose, View
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, value


def unfold_heads(editor: Editor) -> None:
    """Rewrite each such product; what is no view of [B, H, ...] stays."""
    biases: dict[fx.Node, fx.Node] = {}  # one for all layers, so that its meaning is found once
    for logits in Baddbmm.find(editor.graph):
        unfold_logits(editor, logits, biases)
    for product in Bmm.find(editor.graph):
        unfold_product(editor, product)


def unfold_logits(editor: Editor, logits: Baddbmm, biases: dict[fx.Node, fx.Node]) -> None:
    turned = Transpose.match(logits.batch2)
    query, key = unfolded(logits.batch1), None if turned is None else unfolded(turned.input)
    if query is None or key is None or turned is None or {turned.dim0, turned.dim1} not in ({1, 2}, {-1, -2}):
        return
    (batch, heads, count, _), columns = value(query).shape, value(key).shape[2]
    bias, place = logits.input, {"before": logits.node, "like": logits.node}
    if not all_viewed_as(logits.node, (batch, heads, count, columns)):
        return
    if logits.beta != 0 and value(bias).shape[0] != batch * heads:
        return
    key = editor.call(ATEN.transpose.int, key, -1, -2, **place)
    new = editor.call(ATEN.matmul, query, key, **place)
    if logits.alpha != 1:
        new = editor.call(ATEN.mul.Tensor, new, float(logits.alpha), **place)
    if logits.beta != 0:
        if bias not in biases:
            behind: dict[str, Any] = {"before": bias.next, "like": bias}
            biases[bias] = editor.call(ATEN.unflatten.int, bias, 0, [-1, heads], **behind)
        added = biases[bias]
        if logits.beta != 1:
            added = editor.call(ATEN.mul.Tensor, added, float(logits.beta), **place)
        new = editor.call(ATEN.add.Tensor, new, added, **place)
    replace_views(editor, logits.node, new)


def unfold_product(editor: Editor, product: Bmm) -> None:
    weights, val = unfolded(product.input), unfolded(product.mat2)
    if weights is None or val is None:
        return
    if all_viewed_as(product.node, (*value(weights).shape[:3], value(val).shape[3])):
        new = editor.call(ATEN.matmul, weights, val, before=product.node, like=product.node)
        replace_views(editor, product.node, new)


def unfolded(node: fx.Node) -> fx.Node | None:
    """x [B, H, n, m] of view(x, [B * H, n, m])."""
    view = View.match(node)
    if view is None or value(view.input).dim() != 4 or value(node).dim() != 3:
        return None
    batch, heads, *rest = value(view.input).shape
    return view.input if value(node).shape == (batch * heads, *rest) else None


def all_viewed_as(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    return all(View.is_call(user) and tuple(value(user).shape) == shape for user in node.users)


def replace_views(editor: Editor, old: fx.Node, new: fx.Node) -> None:
    """Let the readers of old's views read `new`; old goes."""
    for view in list(old.users):
        editor.replace(view, new)
    editor.graph.erase_node(old)
