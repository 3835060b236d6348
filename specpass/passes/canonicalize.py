"""canonicalize: one spelling for attention, whatever the model wrote.

before: `sdpa(q, reshape(expand(unsqueeze(k))), reshape(expand(unsqueeze(v))), mask, 0.0, causal, scale=s)`
    or  `matmul(softmax(matmul(q, transpose(k)) * s + mask), v)` (attn_implementation="eager", see read/attention.py)
    or  the same over heads that are folded into the batch (see read/folded.py)
after:  `sdpa(q, k, v, mask, 0.0, causal, scale=s, enable_gqa=True)` with k, v [B, K, T, D] as the cache op saw them.
    or  `modified_attention(q, k, v, mask, s, softcap, sinks)` where the logits are capped or the softmax has sinks
    Under autocast q and k come in float32, and are cast to v's dtype in front of the cache, not inside of attention.

Matches by structure and fake shapes; what does not match is left alone, and annotate says so.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.attention import ModifiedAttention
from specpass.dialect.cache import AppendKv, Fill, KeepKv
from specpass.graph.aten import Copy, Expand, Sdpa, Slice, Softmax, Unsqueeze, View
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import ATEN, find, is_op, skip_full_slices, value
from specpass.passes.read.attention import Masks, fuse_eager_attention
from specpass.passes.read.folded import unfold_heads
from specpass.rewrite import Facts, Pass, Request


@dataclasses.dataclass(frozen=True)
class Canonicalize(Pass):
    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[str] = "TRACED"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        drop_grad_modes(gm.graph)
        unify_sizes(gm.graph)
        for copy in Copy.find(gm.graph):
            join_copies(editor, copy)
        unfold_heads(editor)
        masks: Masks = {}
        for softmax in Softmax.find(gm.graph):
            fuse_eager_attention(editor, softmax, masks)
        for modified in ModifiedAttention.find(gm.graph):
            unrepeat(modified)
        for attention in Sdpa.find(gm.graph):
            unrepeat(attention)
        join_values(editor, Sdpa.find(gm.graph))
        for attention in Sdpa.find(gm.graph):
            unfold_query(editor, attention)
        for write in (*Fill.find(gm.graph), *AppendKv.find(gm.graph), *KeepKv.find(gm.graph)):
            cast(editor, write.key, write.value)
        for site in (*Sdpa.find(gm.graph), *ModifiedAttention.find(gm.graph)):
            cast(editor, site.query, site.value)
        gm.graph.eliminate_dead_code()


def drop_grad_modes(graph: fx.Graph) -> None:
    """A graph is for inference; run by itself, its last switch would leave the caller's autograd off."""
    for node in find(graph, torch._C._set_grad_enabled):
        graph.erase_node(node)


def cast(editor: Editor, node: fx.Node, like: fx.Node) -> None:
    """Let everybody read `node` in the dtype of `like`; autocast would make them one inside of attention."""
    if value(node).dtype != value(like).dtype:
        new = editor.call(ATEN.to.dtype, node, value(like).dtype, before=node.next, like=node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def unify_sizes(graph: fx.Graph) -> None:
    """One node for each symbolic size: `sym_size(linear, 1)` deep in a layer is the known prompt length.

    Dynamo may hand over one size as several inputs; only the first is read.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr.free_symbols:
            known = first.setdefault(val.node.expr, node)
            if known is not node:
                node.replace_all_uses_with(known)
                if node.op != "placeholder":
                    graph.erase_node(node)


def join_copies(editor: Editor, last: Copy) -> None:
    """`x = new_empty(..); x[..., :n].copy_(a); x[..., n:].copy_(b)` (MLA's keys) is spelled `cat([a, b], -1)`."""
    cut = Slice.match(last.input)
    if cut is None or not is_op(cut.input, ATEN.new_empty, ATEN.empty):
        return
    place, parts, start = cut.input, [], 0
    for user in place.users:
        part, writes = Slice.match(user), list(user.users)
        copy = Copy.match(writes[0]) if part is not None and len(writes) == 1 else None
        if part is None or copy is None or copy.input is not user:
            break
        same = value(copy.src).shape == value(user).shape and value(copy.src).dtype == value(place).dtype
        if (part.dim, part.start) != (cut.dim, start) or not same or copy.node.users:
            return
        parts.append(copy)
        start += value(user).shape[part.dim]
    readers = [user for user in place.users if user not in {copy.input for copy in parts}]
    if not parts or start != value(place).shape[cut.dim] or any(user < parts[-1].node for user in readers):
        return
    new = editor.call(ATEN.cat, [copy.src for copy in parts], cut.dim, before=parts[-1].node, like=place)
    for reader in readers:
        reader.replace_input_with(place, new)
    for copy in parts:
        editor.graph.erase_node(copy.node)


def join_values(editor: Editor, attentions: list[Sdpa]) -> None:
    """Two attentions of one layer that differ in their values alone (DiffLlama) are one, over both side by side."""
    for first, second in itertools.pairwise(attentions):
        ours, theirs = first.operands(), second.operands()
        if {**ours, "value": None} != {**theirs, "value": None} or ours["value"] is theirs["value"]:
            continue
        if second.value > first.node:
            continue
        place: dict[str, Any] = {"before": first.node, "like": first.node}
        widths = [value(view.value).shape[-1] for view in (first, second)]
        both = editor.call(ATEN.cat, [first.value, second.value], -1, **place)
        with editor.graph.inserting_before(first.node):
            joined = editor.graph.node_copy(first.node)
        Sdpa.of(joined).update(value=both)
        editor.refresh(joined, first.node)
        left = editor.call(ATEN.slice.Tensor, joined, -1, 0, widths[0], **place)
        right = editor.call(ATEN.slice.Tensor, joined, -1, widths[0], sum(widths), **place)
        editor.replace(first.node, left)
        editor.replace(second.node, right)


def unrepeat(attention: Sdpa | ModifiedAttention) -> None:
    """Let attention read K and V before the model repeated them to H heads."""
    key, val = repeated_source(attention.key), repeated_source(attention.value)
    if key is None or val is None:
        return
    attention.update(key=key, value=val)
    if isinstance(attention, Sdpa):
        attention.update(enable_gqa=True)


def unfold_query(editor: Editor, attention: Sdpa) -> None:
    """One new query per head that the model folded to [B, K, G, D] for GQA: spelled [B, H, 1, D] again."""
    node, view = attention.node, View.match(attention.query)
    if view is None:
        return
    source, folded = value(view.input), value(attention.query).shape
    if source.dim() != 4 or source.shape[2] != 1 or folded[2] == 1:
        return
    batch, heads, _, dim = source.shape
    kv_heads = value(attention.key).shape[1]
    if folded != (batch, kv_heads, heads // kv_heads, dim):
        return
    result = value(node)
    users = list(node.users)
    sizes = [size if isinstance(size, int) else -1 for size in result.shape]  # the batch at most is symbolic
    back = editor.call(ATEN.reshape, node, sizes, before=node.next, like=node)
    for user in users:
        user.replace_input_with(node, back)
    attention.update(query=view.input, enable_gqa=True)
    with quiet(editor.mode):
        node.meta["val"] = result.reshape(batch, heads, 1, result.shape[-1])


def repeated_source(node: fx.Node) -> fx.Node | None:
    """k [B, K, T, D] of reshape(expand(unsqueeze(k, 2))) [B, H, T, D]; None if it is spelled otherwise."""
    view = View.match(node)
    wide = None if view is None else Expand.match(view.input)
    inner = None if wide is None else Unsqueeze.match(skip_full_slices(wide.input))
    if wide is None or inner is None or inner.dim not in (2, -3):
        return None
    source = skip_full_slices(inner.input)
    batch, kv_heads, columns, dim = value(source).shape
    group = value(wide.node).shape[2]
    same = value(wide.node).shape == (batch, kv_heads, group, columns, dim)
    return source if same and value(node).shape == (batch, kv_heads * group, columns, dim) else None
