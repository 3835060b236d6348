"""take_last: the logits come from the prompt's own last position, in the layout that the caller gave.

Behind the last attention site nothing mixes positions, so the rows can be taken in front of the first operator that
selects or reduces along the sequence:

before: h [B, S + L, E] -> h[:, -1:] -> lm_head          after: take_positions(h, lengths - 1) [B, 1, E] -> lm_head

Operators over positions that come later (logits of every position asked for) read the rows in the original order. Where
experts sort the rows, they are taken in front of them (`rows/experts.py`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import behind, find, output_of
from specpass.passes.base import Pass, Refusal, State
from specpass.passes.rows.experts import take_in_front_of_blocks
from specpass.passes.rows.rows import every_row, has_rows, keeps_rows, last_only, last_row


@dataclasses.dataclass(frozen=True)
class TakeLast(Pass):
    name: ClassVar[str] = "take_last"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if state.lookahead_ids is None and state.order is None:
            return
        editor = Editor(gm)
        hidden = state.sites[-1].attention
        columns = hidden.meta["val"].shape[2]
        output = output_of(gm.graph)
        done = take_in_front_of_blocks(editor, state, hidden, columns)  # behind a take, in the caller's layout already
        tail = behind(hidden)
        for node in [n for n in gm.graph.nodes if n in tail]:
            if node is output or node in done or keeps_rows(node, columns):
                continue
            for source in [n for n in node.all_input_nodes if n in tail - done and has_rows(n, columns)]:
                done |= behind(self._take(editor, state, node, source, columns))
        for source in [n for n in output.all_input_nodes if n in tail - done and has_rows(n, columns)]:
            index = every_row(editor, state, output)
            new = editor.call(SPEC.take_positions, source, index, before=output, like=source)
            output.replace_input_with(source, new)
        refuse_mixed_rows(gm, columns)

    @staticmethod
    def _take(editor: Editor, state: State, node: fx.Node, source: fx.Node, columns: object) -> fx.Node:
        if source.meta["val"].dim() != 3 or source.meta["val"].shape[1] != columns:
            raise Refusal(f"{node.target} mixes positions behind the last attention site")
        index = last_row(editor, state, node) if last_only(node) else every_row(editor, state, node)
        new = editor.call(SPEC.take_positions, source, index, before=node, like=node)
        node.replace_input_with(source, new)
        if "val" in node.meta:
            editor.refresh(node)
        return new


def refuse_mixed_rows(gm: fx.GraphModule, columns: object) -> None:
    """Behind a take, rows are in the caller's layout: nothing there may also read packed rows from in front of it."""
    takes = set(find(gm.graph, SPEC.take_positions))
    after = set().union(*(behind(take) for take in takes)) if takes else set()
    for node in after - takes - {output_of(gm.graph)}:
        for source in node.all_input_nodes:
            if source not in after and source not in takes and has_rows(source, columns):
                raise Refusal(f"{node.target} reads rows from in front of the last attention site")
