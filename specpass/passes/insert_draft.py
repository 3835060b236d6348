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
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from specpass.dialect.cache import Lookahead, Size
from specpass.dialect.define import SPEC
from specpass.dialect.rows import ExpandRows, FullLengths, PackIds, PackOrder
from specpass.graph.edit import Editor, quiet
from specpass.graph.operands import GetItem
from specpass.graph.walk import is_size, value
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Drafted, Inputs, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request


@dataclasses.dataclass(frozen=True)
class InsertDraft(Pass):
    name: ClassVar[str] = "insert_draft"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Inputs, Rows)
    provides: ClassVar[tuple[type, ...]] = (Drafted,)

    def applies(self, request: Request) -> bool:
        return request.lookahead > 0

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, ids, rows = Editor(gm), facts[Inputs].ids, facts[Rows]
        if ids is None:
            raise Refusal(
                f"the prompt came as inputs_embeds, and {request.pruning.name} looks ahead of token ids: pass "
                "input_ids, or use a method without a lookahead (SnapKV, StreamingLLM)"
            )
        size = value(ids).shape[1]
        if not isinstance(size, torch.SymInt):
            raise Refusal("the prompt length is a constant of the graph; compile with dynamic=True")
        if not request.compresses:
            restate_prompt_length(gm, editor, size, request.lookahead)
        anchor = first_target_use(gm)
        placeholder = Lookahead.find(gm.graph)[0]
        draft = facts.get(DraftGraphs)
        if draft is None:  # the caller's ids
            given = editor.call(SPEC.lookahead, ids, placeholder.given, request.lookahead, before=anchor)
            drafted = Drafted(given, anchor)
        else:
            drafted = draft.insert(editor, request.lookahead, ids, rows.lengths, anchor)
        editor.replace(placeholder.node, drafted.ids)
        facts.add(drafted)
        if not request.compresses:
            extend_prompt(editor, facts, drafted, size, request.lookahead)


def restate_prompt_length(gm: fx.GraphModule, editor: Editor, size: torch.SymInt, length: int) -> None:
    """Inputs of prompt length [.., s] get fake values of length s - L: s now stands for S + L."""
    expr = size.node.expr
    if not expr.is_symbol:
        raise Refusal(f"the prompt length is the expression {expr}, not a symbol")
    with quiet(editor.mode):
        for node in gm.graph.nodes:
            if "val" in node.meta and (node.op == "placeholder" or is_pack(node)):
                node.meta["val"] = shortened(node.meta["val"], expr, length)


def shortened(val: Any, expr: sympy.Expr, length: int) -> Any:
    """A fake value with `length` less in the place of each size `expr`."""
    if is_size(val, expr):
        return val - length
    if isinstance(val, torch.Tensor) and any(is_size(dim, expr) for dim in val.shape):
        shape = [dim - length if is_size(dim, expr) else dim for dim in val.shape]
        return torch.empty(shape, dtype=val.dtype, device=val.device)
    if isinstance(val, (tuple, list)):
        return tuple(shortened(item, expr, length) for item in val)
    return val


def is_pack(node: fx.Node) -> bool:
    """Whether the node was made by pack_rows, in front of the target's own nodes."""
    item = GetItem.match(node)
    if item is not None:
        return is_pack(item.source)
    return any(view.is_call(node) for view in (PackOrder, PackIds, FullLengths, ExpandRows))


def first_target_use(gm: fx.GraphModule) -> fx.Node:
    """The first node of the target proper, behind the packing."""
    return next(node for node in gm.graph.nodes if node.op != "placeholder" and not is_pack(node))


def extend_prompt(editor: Editor, facts: Facts, drafted: Drafted, size: torch.SymInt, length: int) -> None:
    """Let the target's nodes read S + L tokens."""
    anchor, inputs, lengths = drafted.anchor, facts[Inputs], facts[Rows].lengths
    columns = columns_of(editor.graph, size, length)
    longer: list[tuple[fx.Node | None, Any, tuple[Any, ...]]] = [
        (inputs.tokens, SPEC.append_ids, (drafted.ids, lengths)),
        (columns, operator.add, (length,)),
        (inputs.positions, SPEC.append_positions, (lengths, length)),
    ]
    for node, target, operands in longer:
        if node is not None:
            readers = [user for user in node.users if user >= anchor and not Size.is_call(user)]
            new = editor.call(target, node, *operands, before=anchor)
            for reader in readers:
                reader.replace_input_with(node, new)


def columns_of(graph: fx.Graph, size: torch.SymInt, length: int) -> fx.Node | None:
    """The input that holds the prompt's length, where there is one."""
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(value(node), torch.SymInt) and is_size(value(node) + length, size):
            return node
    return None
