"""insert_draft: the draft becomes a subgraph, its lookahead stands behind the prompt, S becomes S + L.

before: logits = target(ids [B, S])
after:  caches, logits = draft_prefill(ids, lengths, L); token = next_token(logits)
        token, caches = draft_step(token, lengths + i, caches)      L - 1 times, one subgraph
        logits = target(append_ids(ids, lookahead, lengths) [B, S + L])[last prompt position]

The target's own nodes are not touched: the symbol that meant S in them now means S + L, so only the inputs' shapes
are restated as (symbol - L). Where the prompt is compressed (SpecPC), the draft also yields scores [B, S] of the
prompt's tokens, and what the target reads is left to gather_prompt and resize_prompt.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import find, is_op, is_size, value
from specpass.passes.base import Pass, Refusal, State


@dataclasses.dataclass(frozen=True)
class InsertDraft(Pass):
    name: ClassVar[str] = "insert_draft"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if state.lookahead == 0:
            return
        editor = Editor(gm)
        ids = state.inputs["input_ids"]
        size = ids.meta["val"].shape[1]
        if not isinstance(size, torch.SymInt):
            raise Refusal("the prompt length is a constant of the graph; compile with dynamic=True")
        compresses = state.method.prompt is not None
        if not compresses:
            restate_prompt_length(gm, editor, size, state.lookahead)
        anchor = state.anchor = first_target_use(gm)
        lookahead = find(gm.graph, SPEC.lookahead)[0]
        if state.draft is None:  # the caller's ids
            ahead = editor.call(SPEC.lookahead, ids, lookahead.args[1], state.lookahead, before=anchor)
        else:
            ahead, state.prompt_scores = state.draft.insert(editor, state, ids, anchor)
        editor.replace(lookahead, ahead)
        state.lookahead_ids = ahead
        if not compresses:
            extend_prompt(gm, editor, state, ids, ahead, anchor, size)


def restate_prompt_length(gm: fx.GraphModule, editor: Editor, size: torch.SymInt, length: int) -> None:
    """Inputs of prompt length [.., s] get fake values of length s - L: s now stands for S + L."""
    expr = size.node.expr
    if not expr.is_symbol:
        raise Refusal(f"the prompt length is the expression {expr}, not a symbol")
    for node in list(gm.graph.nodes):
        val = node.meta.get("val")
        own = node.op == "placeholder" or is_pack(node)
        if not own:
            continue
        with quiet(editor.mode):
            if is_size(val, expr):
                node.meta["val"] = val - length
            elif isinstance(val, torch.Tensor) and any(is_size(dim, expr) for dim in val.shape):
                shape = [dim - length if is_size(dim, expr) else dim for dim in val.shape]
                node.meta["val"] = torch.empty(shape, dtype=val.dtype, device=val.device)
            elif isinstance(val, (tuple, list)):
                shapes = [[dim - length if is_size(dim, expr) else dim for dim in v.shape] for v in val]
                node.meta["val"] = tuple(
                    torch.empty(shape, dtype=v.dtype, device=v.device) for shape, v in zip(shapes, val, strict=True)
                )


def is_pack(node: fx.Node) -> bool:
    """Whether the node was made by pack_rows, in front of the target's own nodes."""
    packs = (SPEC.pack_order, SPEC.pack_ids, SPEC.full_lengths, SPEC.expand_rows)
    target = getattr(node.target, "overloadpacket", node.target)
    return target in packs or (node.target is operator.getitem and is_pack(node.args[0]))


def first_target_use(gm: fx.GraphModule) -> fx.Node:
    """The first node of the target proper, behind the packing."""
    return next(node for node in gm.graph.nodes if node.op != "placeholder" and not is_pack(node))


def extend_prompt(
    gm: fx.GraphModule, editor: Editor, state: State, ids: fx.Node, ahead: fx.Node, anchor: fx.Node, size: torch.SymInt
) -> None:
    """Let the target's nodes read S + L tokens."""
    behind = {node for node in gm.graph.nodes if node >= anchor}
    columns = next(
        (
            node
            for node in gm.graph.nodes
            if node.op == "placeholder"
            and isinstance(value(node), torch.SymInt)
            and is_size(value(node) + state.lookahead, size)
        ),
        None,
    )
    users = {
        node: [user for user in node.users if user in behind]
        for node in (ids, columns, state.inputs.get("position_ids"))
        if node is not None
    }
    for node, readers in users.items():
        if node is columns:
            with editor.graph.inserting_before(anchor):
                new = editor.graph.call_function(operator.add, (node, state.lookahead))
            editor.refresh(new)
        elif node is ids:
            new = editor.call(SPEC.append_ids, ids, ahead, state.lengths, before=anchor)
        else:
            new = editor.call(SPEC.append_positions, node, state.lengths, state.lookahead, before=anchor)
        for reader in readers:
            if reader not in (ahead, new) and not is_op(reader, SPEC.size):
                reader.replace_input_with(node, new)
