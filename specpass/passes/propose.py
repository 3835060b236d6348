"""propose: what a draft writes next behind tokens that it has not read, as one graph.

logits = extend(ids [B, q], position [B, q], *caches, *params)           the q tokens that it has not read
token = next_token(logits)
token = next_token(plain_step(token, position + i, *caches, *params))     k - 1 times, one subgraph
-> ids [B, k]

Several futures, as a lookahead, are rows of one batch [B * M] with copies of the caches, from the first token on.
-> ids [B, M k]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, copy_module, quiet
from specpass.graph.operands import results_of
from specpass.graph.walk import ATEN, output_of, value
from specpass.passes.draft import DraftGraphs


def proposal_graph(draft: DraftGraphs, count: int, *, lookahead: bool = False) -> fx.GraphModule:
    """ids [B, k] for k = `count`, from inputs as those of `draft.extend`; the caches are written in place.

    Args: lookahead: they are chosen, and end, as behind a prompt; else greedily, whatever they are.
    """
    assert draft.extend is not None, "captured to go on"
    assert draft.plain_step is not None
    gm = copy_module(draft.extend)
    gm.meta.update(draft.extend.meta)
    editor, output = Editor(gm), output_of(gm.graph)
    ids, position, *rest = gm.graph.find_nodes(op="placeholder")
    last = editor.call(ATEN.slice.Tensor, position, 1, -1, before=output)
    ended = editor.call(ATEN.zeros_like, editor.call(ATEN.select.int, ids, 1, 0, before=output), before=output)
    ended = editor.call(ATEN.to.dtype, ended, torch.bool, before=output)
    if count > 1:
        gm.add_submodule("draft_step", draft.plain_step)
    val, logits = value(results_of(draft.plain_step.graph)[0]), results_of(gm.graph)[0]
    temperature, seed = (draft.temperature, draft.seed) if lookahead else (0.0, 0)
    ends = list(draft.eos_ids) if lookahead else []
    futures, caches = draft.futures if lookahead else 1, 3 * draft.layers
    if futures > 1:
        copied = [
            editor.call(ATEN.repeat_interleave.self_int, node, futures, 0, before=output)
            for node in (logits, ended, last, *rest[:caches])
        ]
        (logits, ended, last), rest = copied[:3], [*copied[3:], *rest[caches:]]
        with quiet(editor.mode):
            val = val.new_empty(value(last).shape[0], *val.shape[1:])
    tokens: list[fx.Node] = []
    for index in range(count):
        if index:
            told = editor.call(ATEN.add.Tensor, last, index, before=output)
            logits = editor.call_module("draft_step", tokens[-1], told, *rest, before=output, val=val)
        how: tuple[Any, ...] = (SPEC.next_token, logits, ended, draft.shared_vocab, temperature, seed, index)
        if futures > 1:
            how = (SPEC.next_tokens, logits, ended, futures, draft.shared_vocab)
        pair = editor.call(*how, ends, draft.pad_id, before=output)
        if lookahead:
            ended = editor.item(pair, 1, output)
        tokens.append(editor.item(pair, 0, output))
    ids = editor.call(ATEN.cat, tokens, 1, before=output)
    if futures > 1:
        ids = editor.call(ATEN.reshape, ids, [-1, futures * count], before=output)
    output.args = (ids,)
    gm.recompile()
    return gm
