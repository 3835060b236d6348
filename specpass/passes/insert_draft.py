"""insert_draft: the draft becomes a subgraph, its lookahead stands behind the prompt, S becomes S + L.

before: logits = target(ids [B, S])
after:  caches, logits = draft_prefill(ids, lengths, L); token = next_token(logits)
        token, caches = draft_step(token, lengths + i, caches)      L - 1 times, one subgraph
        logits = target(append_ids(ids, lookahead, lengths) [B, S + L])[last prompt position]

Several futures (M branches of L tokens) stand side by side there, S + M L: their positions count from the prompt's end
each, and attend_branches keeps them apart.

Where the target is spread over processes, the lookahead is the first one's on all of them.

Without a draft the lookahead is the caller's ids, or prompt_lookup(ids, lengths, L). A draft with another tokenizer
reads the prompt in front of the graph: its tokens and scores, in the target's, come as inputs like the caller's.

The target's own nodes do what they did; in their fake values s + L stands where s, the symbol of the inputs' length,
stood. Where the prompt is compressed (SpecPC), the draft also yields scores [B, S] of the
prompt's tokens, and what the target reads is left to gather_prompt and resize_prompt.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.cache import Fill, Lookahead, ReadPrompt, Size
from specpass.dialect.define import SPEC
from specpass.dialect.rows import ExpandRows, FullLengths, PackIds, PackOrder
from specpass.graph.aten import Largest
from specpass.graph.edit import Editor
from specpass.graph.operands import GetItem, results_of
from specpass.graph.sizes import Substitution
from specpass.graph.walk import depends, is_size, output_of, value
from specpass.parallel.shards import Ranks
from specpass.passes.draft import DraftGraphs
from specpass.passes.exchange import of_rank_0
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
                f"the prompt came as inputs_embeds, and {request.pruning.name} looks ahead of token ids: use "
                "specpass.compile(model, ...) and pass lookahead_ids=[B, L] with it, or a method without a lookahead "
                "(SnapKV, StreamingLLM)"
            )
        size = value(ids).shape[1]
        if not isinstance(size, torch.SymInt):
            raise Refusal("the prompt length is a constant of the graph; compile with dynamic=True")
        anchor = first_target_use(gm)
        futures = request.pruning.futures
        if not request.compresses:
            if facts[Inputs].positions is None:
                check_highest(gm.graph, anchor)
                if futures > 1:
                    raise Refusal("several futures count from the prompt's end each, and no position_ids are given")
            lengthen(gm, anchor, size, request.lookahead * futures)
        placeholder = Lookahead.find(gm.graph)[0]
        draft = facts.get(DraftGraphs)
        if placeholder.given is None and request.pruning.looks_up:
            found = editor.call(SPEC.prompt_lookup, ids, rows.lengths, request.lookahead, before=anchor)
            drafted = Drafted(found, anchor)
        elif draft is None:  # the caller's ids
            given = editor.call(SPEC.lookahead, ids, placeholder.given, request.lookahead, before=anchor)
            drafted = Drafted(given, anchor, next((read.scores for read in ReadPrompt.find(gm.graph)), None))
        else:
            room = Fill.find(gm.graph)[0].room if request.goes_on else 0
            drafted = draft.insert(editor, request.lookahead, ids, rows.lengths, anchor, room)
            drafted = agreed(editor, drafted, facts.get(Ranks))
            if request.goes_on:
                output_of(gm.graph).args = ((*results_of(gm.graph), *drafted.caches),)
        editor.replace(placeholder.node, drafted.ids)
        facts.add(drafted)
        if not request.compresses:
            extend_prompt(editor, facts, drafted, size, request.lookahead, futures)


def agreed(editor: Editor, drafted: Drafted, ranks: Ranks | None) -> Drafted:
    """The first rank's lookahead on all ranks, in front of the target."""
    ids, futures = (
        None if node is None else of_rank_0(editor, node, ranks, drafted.anchor)
        for node in (drafted.ids, drafted.futures)
    )
    assert ids is not None, "a draft has written"
    return dataclasses.replace(drafted, ids=ids, futures=futures)


def lengthen(gm: fx.GraphModule, anchor: fx.Node, size: torch.SymInt, length: int) -> None:
    """The target's own nodes, from `anchor` on, get the fake values of a prompt of S + L tokens: s + L stands for s.

    The inputs keep theirs, so that any L stands beside any S.
    """
    if not size.node.expr.is_symbol:
        raise Refusal(f"the prompt length is the expression {size.node.expr}, not a symbol")
    longer = Substitution(gm, size.node.expr, size.node.expr + length)
    node = anchor
    while node.op != "output":
        if depends(node.meta.get("val"), size):
            node.meta["val"] = longer.of(node.meta["val"])
        node = node.next


def is_pack(node: fx.Node) -> bool:
    """Whether the node was made by pack_rows, in front of the target's own nodes."""
    item = GetItem.match(node)
    if item is not None:
        return is_pack(item.source)
    return any(view.is_call(node) for view in (PackOrder, PackIds, FullLengths, ExpandRows))


def first_target_use(gm: fx.GraphModule) -> fx.Node:
    """The first node of the target proper, behind the packing."""
    return next(node for node in gm.graph.nodes if node.op != "placeholder" and not is_pack(node))


def extend_prompt(
    editor: Editor, facts: Facts, drafted: Drafted, size: torch.SymInt, length: int, futures: int
) -> None:
    """Let the target's nodes read S + M L tokens."""
    anchor, inputs, lengths = drafted.anchor, facts[Inputs], facts[Rows].lengths
    columns = columns_of(editor.graph, size)
    longer: list[tuple[fx.Node | None, Any, tuple[Any, ...]]] = [
        (inputs.tokens, SPEC.append_ids, (drafted.read, lengths)),
        (columns, operator.add, (length * futures,)),
        (inputs.positions, SPEC.append_positions, (lengths, length, futures) if futures > 1 else (lengths, length)),
    ]
    for node, target, operands in longer:
        if node is not None:
            readers = [user for user in node.users if user >= anchor and not Size.is_call(user)]
            if node is inputs.positions:  # rotary frequencies that follow the length are those of the prompt
                readers = [reader for reader in readers if not is_highest(reader)]
            new = editor.call(target, node, *operands, before=anchor)
            for reader in readers:
                reader.replace_input_with(node, new)


def is_highest(node: fx.Node) -> bool:
    """Whether it is the highest of all positions."""
    largest = Largest.match(node)
    return largest is not None and largest.dim is None


def check_highest(graph: fx.Graph, anchor: fx.Node) -> None:
    """Raises: Refusal: frequencies follow a length that the lookahead adds to."""
    for node in graph.nodes:
        if node > anchor and is_highest(node) and value(node).dtype == torch.int64:
            raise Refusal(
                "rotary frequencies follow the highest position, which nobody gave, so the lookahead's would count: "
                "pass position_ids"
            )


def columns_of(graph: fx.Graph, size: torch.SymInt) -> fx.Node | None:
    """The input that holds the prompt's length, where there is one."""
    for node in graph.nodes:
        if node.op == "placeholder" and is_size(value(node), size):
            return node
    return None
