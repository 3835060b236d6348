"""shift_positions: in decode, what generate counts becomes what the target was told (SpecPC, renumbered).

before: rotary(position_ids)                            or rotary(arange(q) + seen) where none are given
after:  rotary(told_positions(position_ids, shift))     or rotary(arange(q) + told_length(seen, shift))

`seen` is the cache's logical length; `shift` [B] is 0 where nothing was renumbered.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import find
from specpass.passes.base import Pass, State


@dataclasses.dataclass(frozen=True)
class ShiftPositions(Pass):
    name: ClassVar[str] = "shift_positions"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[str, ...]] = ("decode", "append")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        editor = Editor(gm)
        for advance in find(gm.graph, SPEC.advance):
            seen, shift, _ = advance.args
            if shift is None:
                continue
            before = next(node for node in gm.graph.nodes if node.op != "placeholder")
            given = state.inputs.get("position_ids")
            source, target = (seen, SPEC.told_length) if given is None else (given, SPEC.told_positions)
            readers = [user for user in source.users if user is not advance]
            new = editor.call(target, source, shift, before=before)
            for reader in readers:
                reader.replace_input_with(source, new)
            advance.args = (seen, None, advance.args[2])  # its shift has been read
