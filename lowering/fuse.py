"""fuse: two operators become one where the second can use what the first has at hand, as the kernels' table says.

before: out = prefill_attention(q, k, v, scale); scores = importance(take_rows(q, rows), k, rows, ...)
after:  out, lse = prefill_attention_lse(q, k, v, rows, scale); scores = importance(..., lse)       K is read once less

before: append_kv(keys, values, lengths, k, v); out = attend(q, view(keys), view(values), lengths, scale)
after:  out = append_attend(keys, values, lengths, q, k, v, scale)                                  one launch
"""

from __future__ import annotations

from typing import Any

from torch import fx

from specpass.dialect.attention import Attend
from specpass.dialect.cache import AppendKv
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, copy_module
from specpass.graph.walk import ATEN, VIEWS, find, is_op, value
from specpass.kernels.dispatch import choose, returns_lse

SAME_STORAGE = (*VIEWS, ATEN.unflatten)


def fuse(gm: fx.GraphModule) -> None:
    """Fuse in place, the graphs that it calls (the draft's) too; those are shared, so copies take their place."""
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            fused = child.meta.get("specpass_fused")
            if fused is None:
                fused = copy_module(child)
                fuse(fused)
                fused.recompile()
                child.meta["specpass_fused"] = fused
            setattr(gm, name, fused)
    for node in find(gm.graph, SPEC.importance):
        share_lse(gm, node)
    for node in find(gm.graph, SPEC.attend):
        fuse_append(gm, node)
    gm.graph.lint()


def share_lse(gm: fx.GraphModule, importance: fx.Node) -> None:
    """Let a site's attention hand its log-sum-exp to the importance of the same queries and keys."""
    taken, key, rows, _, _, scale, *_ = importance.args
    if not is_op(taken, SPEC.take_rows) or taken.args[1] is not rows:
        return
    query = taken.args[0]
    attention = next(
        (
            user
            for user in query.users
            if is_op(user, SPEC.prefill_attention) and user.args[1] is key and user.args[3:] == (scale,)
        ),
        None,
    )  # a cap changes the log-sum-exp
    if attention is None or not rows < attention < importance:
        return
    tensors = attention.args[:3]
    if not returns_lse(*map(value, tensors)):
        return
    editor = Editor(gm)
    both = editor.call(SPEC.prefill_attention_lse, *tensors, rows, scale, before=attention, like=attention)
    out, lse = (editor.item(both, index, attention) for index in (0, 1))
    editor.replace(attention, out)
    given = [*importance.args, None][:8]  # with or without weights
    importance.args = (*given, lse)


def fuse_append(gm: fx.GraphModule, attend: fx.Node) -> None:
    """Let attention write the token that it attends to."""
    query, keys, values, lengths, *logits = attend.args
    storage = [storage_of(node) for node in (keys, values)]
    append = next(
        (
            user
            for user in storage[0].users
            if is_op(user, SPEC.append_kv) and [*user.args[:3]] == [*storage, lengths] and user < attend
        ),
        None,
    )
    if append is None or any(reads(node, {*storage, lengths}) for node in between(append, attend)):
        return
    args = (*append.args[:3], query, *append.args[3:5], *logits)
    operands = Attend.of(attend).values() | AppendKv.of(append).values()  # the storage itself, not views of it
    if choose("append_attend", operands).kernel is None:
        return
    editor = Editor(gm)
    editor.replace(attend, editor.call(SPEC.append_attend, *args, before=attend, like=attend))
    gm.graph.erase_node(append)


def storage_of(node: Any) -> fx.Node:
    """The tensor that `node` is a view of."""
    while is_op(node, *SAME_STORAGE):
        node = node.args[0]
    return node


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Nodes after `first` and before `last`."""
    found, node = [], first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def reads(node: fx.Node, storage: set[fx.Node]) -> bool:
    """Whether a node reads one of the tensors (a view of it reads nothing)."""
    return not is_op(node, *SAME_STORAGE) and any(storage_of(source) in storage for source in node.all_input_nodes)
