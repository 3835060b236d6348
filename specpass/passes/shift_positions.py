"""shift_positions: in decode, what generate counts becomes what the target was told (SpecPC, renumbered).

before: rotary(position_ids)                            or rotary(arange(q) + seen) where none are given
after:  rotary(told_positions(position_ids, shift))     or rotary(arange(q) + told_length(seen, shift))

`seen` is the cache's logical length; `shift` [B] is 0 where nothing was renumbered.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import Advance
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import first_call
from specpass.passes.facts import Inputs
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import STEPS


@dataclasses.dataclass(frozen=True)
class ShiftPositions(Pass):
    name: ClassVar[str] = "shift_positions"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = STEPS

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, inputs = Editor(gm), facts.get(Inputs)
        given = None if inputs is None else inputs.positions
        for advance in Advance.find(gm.graph):
            seen, shift = advance.seen, advance.shift
            if shift is None:
                continue
            source, target = (seen, SPEC.told_length) if given is None else (given, SPEC.told_positions)
            readers = [user for user in source.users if user is not advance.node]
            new = editor.call(target, source, shift, before=first_call(gm.graph))
            for reader in readers:
                reader.replace_input_with(source, new)
            advance.update(shift=None)  # it has been read
