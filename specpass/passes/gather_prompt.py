"""gather_prompt: which prompt tokens the target reads (SpecPC, SpecKV-PC).

before: scores [B, S] from the draft, lengths [B] of the prompt
after:  positions = select_prompt(scores, lengths, C, W, kernel, neighbours, pool)      [B, C], ascending, -1 unused
        lengths = count_kept(positions); shift = prompt lengths - lengths (0 where the original numbers are kept)

Where the target is spread over processes, the positions are those of the first one.

The target still reads the whole prompt: resize_prompt changes that, once take_last has placed the logits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import ReadPrompt
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.operands import items_of
from specpass.graph.walk import ATEN
from specpass.parallel.shards import Ranks
from specpass.passes.exchange import of_rank_0
from specpass.passes.facts import Drafted, ReadPositions, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request


@dataclasses.dataclass(frozen=True)
class GatherPrompt(Pass):
    name: ClassVar[str] = "gather_prompt"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Drafted, Rows)
    provides: ClassVar[tuple[type, ...]] = (ReadPositions,)

    def applies(self, request: Request) -> bool:
        return request.compresses

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        how, drafted, lengths = request.pruning.prompt, facts[Drafted], facts[Rows].lengths
        if how is None or drafted.scores is None:
            raise Refusal("the draft does not score the prompt's tokens")
        editor, before = Editor(gm), drafted.anchor
        positions = editor.call(
            SPEC.select_prompt,
            drafted.scores,
            lengths,
            how.budget,
            how.window,
            how.kernel,
            how.neighbours,
            how.pool,
            before=before,
        )
        positions = of_rank_0(editor, positions, facts.get(Ranks), before)
        kept = editor.call(SPEC.count_kept, positions, before=before)
        if how.positions == "original":
            shift = editor.call(ATEN.zeros_like, lengths, before=before)
        else:
            shift = editor.call(ATEN.sub.Tensor, lengths, kept, before=before)
        tell_the_cache(editor, positions, shift)
        facts.add(ReadPositions(positions))
        facts.add(dataclasses.replace(facts[Rows], lengths=kept))


@dataclasses.dataclass(frozen=True)
class KeepPrompt(Pass):
    """keep_prompt: a prompt that fits the budget is read whole.

    before: positions, shift = read_prompt(key)
    after:  positions = keep_all(lengths, 1, C) [B, C]; shift = 0
    """

    name: ClassVar[str] = "keep_prompt"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = ("short",)
    requires: ClassVar[tuple[type, ...]] = (Rows,)

    def applies(self, request: Request) -> bool:
        return request.compresses

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        how, editor, lengths = request.pruning.prompt, Editor(gm), facts[Rows].lengths
        assert how is not None
        before = lengths.next
        kept = editor.call(SPEC.keep_all, lengths, 1, how.budget, before=before)
        positions = editor.call(ATEN.select.int, kept, 1, 0, before=before)
        tell_the_cache(editor, positions, editor.call(ATEN.zeros_like, lengths, before=before))


def tell_the_cache(editor: Editor, positions: fx.Node, shift: fx.Node) -> None:
    """Put what the target reads in the place of what the cache's read_prompt said: everything, without a shift."""
    read = ReadPrompt.find(editor.graph)[0].node
    for index, users in items_of(read).items():
        for user in users:
            editor.replace(user, (positions, shift)[index])
    editor.graph.erase_node(read)
