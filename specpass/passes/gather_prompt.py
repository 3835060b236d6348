"""gather_prompt: which prompt tokens the target reads (SpecPC, SpecKV-PC).

before: scores [B, S] from the draft, lengths [B] of the prompt
after:  positions = select_prompt(scores, lengths, C, W, kernel, neighbours, pool)      [B, C], ascending, -1 unused
        lengths = count_kept(positions); shift = prompt lengths - lengths (0 where the original numbers are kept)

The target still reads the whole prompt: resize_prompt changes that, once take_last has placed the logits. A prompt
that fits the budget ("short") is read whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, find, items_of
from specpass.passes.base import Pass, Refusal, State


@dataclasses.dataclass(frozen=True)
class GatherPrompt(Pass):
    name: ClassVar[str] = "gather_prompt"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        how = state.method.prompt
        if how is None:
            return
        editor = Editor(gm)
        read = find(gm.graph, SPEC.read_prompt)[0]
        prompt_lengths: Any = state.lengths
        before: Any = state.anchor
        if state.kind == "short":
            before = prompt_lengths.next
            kept = editor.call(SPEC.keep_all, prompt_lengths, 1, how.budget, before=before)
            positions = editor.call(ATEN.select.int, kept, 1, 0, before=before)
        elif state.prompt_scores is None:
            raise Refusal("no draft was inserted, so nothing scores the prompt's tokens")
        else:
            positions = editor.call(
                SPEC.select_prompt,
                state.prompt_scores,
                prompt_lengths,
                how.budget,
                how.window,
                how.kernel,
                how.neighbours,
                how.pool,
                before=before,
            )
            state.prompt_positions = positions
            state.lengths = editor.call(SPEC.count_kept, positions, before=before)
        if state.kind == "short" or how.positions == "original":
            shift = editor.call(ATEN.zeros_like, prompt_lengths, before=before)
        else:
            shift = editor.call(ATEN.sub.Tensor, prompt_lengths, state.lengths, before=before)
        for index, users in items_of(read).items():
            for user in users:
                editor.replace(user, (positions, shift)[index])
        gm.graph.erase_node(read)
