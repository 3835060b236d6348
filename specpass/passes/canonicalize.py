"""canonicalize: one spelling for attention, whatever the model wrote.

before: `sdpa(q, reshape(expand(unsqueeze(k))), reshape(expand(unsqueeze(v))), mask, 0.0, causal, scale=s)`
    or  `matmul(softmax(matmul(q, transpose(k)) * s + mask), v)` (attn_implementation="eager", see read/attention.py)
after:  `sdpa(q, k, v, mask, 0.0, causal, scale=s, enable_gqa=True)` with k, v [B, K, T, D] as the cache op saw them.
    or  `modified_attention(q, k, v, mask, s, softcap, sinks)` where the logits are capped or the softmax has sinks

Matches by structure and fake shapes; what does not match is left alone, and annotate says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import ATEN, VIEWS, find, is_op, skip_full_slices, value
from specpass.passes.base import Pass, State
from specpass.passes.read.attention import fuse_eager_attention


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[str] = "TRACED"

    def run(self, gm: fx.GraphModule, state: State) -> None:
        editor = Editor(gm)
        drop_grad_modes(gm.graph)
        unify_sizes(gm.graph)
        for softmax in find(gm.graph, ATEN.softmax, ATEN._softmax):
            fuse_eager_attention(editor, softmax)
        for node in find(gm.graph, ATEN.scaled_dot_product_attention, SPEC.modified_attention):
            unrepeat(node)
        for node in find(gm.graph, ATEN.scaled_dot_product_attention):
            unfold_query(editor, node)
        gm.graph.eliminate_dead_code()


def drop_grad_modes(graph: fx.Graph) -> None:
    """A graph is for inference; run by itself, its last switch would leave the caller's autograd off."""
    for node in find(graph, torch._C._set_grad_enabled):
        graph.erase_node(node)


def unify_sizes(graph: fx.Graph) -> None:
    """One node for each symbolic size: `sym_size(linear, 1)` deep in a layer is the known prompt length."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr.free_symbols:
            known = first.setdefault(val.node.expr, node)
            if known is not node and node.op != "placeholder":
                node.replace_all_uses_with(known)
                graph.erase_node(node)


def unrepeat(node: fx.Node) -> None:
    """Let attention read K and V before the model repeated them to H heads."""
    query, key, val, *rest = node.args
    sources = [repeated_source(states) for states in (key, val)]
    if any(source is None for source in sources):
        return
    node.args = (query, *sources, *rest)
    if is_op(node, ATEN.scaled_dot_product_attention):
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def unfold_query(editor: Editor, node: fx.Node) -> None:
    """One new query per head that the model folded to [B, K, G, D] for GQA: spelled [B, H, 1, D] again."""
    query, key = node.args[:2]
    source = query.args[0] if is_op(query, *VIEWS) else None
    if source is None or value(source).dim() != 4 or value(source).shape[2] != 1 or value(query).shape[2] == 1:
        return
    batch, heads, _, dim = value(source).shape
    folded = value(query).shape
    if folded != (batch, value(key).shape[1], heads // value(key).shape[1], dim):
        return
    result = value(node)
    users = list(node.users)
    sizes = [size if isinstance(size, int) else -1 for size in result.shape]  # the batch at most is symbolic
    back = editor.call(ATEN.reshape, node, sizes, before=node.next, like=node)
    for user in users:
        user.replace_input_with(node, back)
    node.args = (source, *node.args[1:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}
    with quiet(editor.mode):
        node.meta["val"] = result.reshape(batch, heads, 1, result.shape[-1])


def repeated_source(node: Any) -> fx.Node | None:
    """k [B, K, T, D] of reshape(expand(unsqueeze(k, 2))) [B, H, T, D]; None if it is spelled otherwise."""
    if not is_op(node, *VIEWS):
        return None
    wide = node.args[0]
    if not is_op(wide, ATEN.expand):
        return None
    inner = skip_full_slices(wide.args[0])
    if not is_op(inner, ATEN.unsqueeze) or inner.args[1] not in (2, -3):
        return None
    source = skip_full_slices(inner.args[0])
    if not isinstance(source, fx.Node):
        return None
    narrow, full = value(source).shape, value(node).shape
    batch, kv_heads, columns, dim = narrow
    group = value(wide).shape[2]
    same = value(wide).shape == (batch, kv_heads, group, columns, dim)
    return source if same and full == (batch, kv_heads * group, columns, dim) else None
