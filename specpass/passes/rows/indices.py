"""Where prompts end among packed rows."""

from __future__ import annotations

from torch import fx

from specpass.dialect.define import SPEC
from specpass.errors import UnsupportedCallError
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN
from specpass.passes.facts import Inputs, ReadPositions, Rows
from specpass.rewrite import Facts, Request


class RowIndices:
    """Indices of a prompt's rows among packed ones, as nodes."""

    def __init__(self, editor: Editor, request: Request, facts: Facts) -> None:
        self.editor, self.request, self.facts = editor, request, facts

    def last(self, before: fx.Node) -> fx.Node:
        """[B, 1]: each prompt's last row."""
        less = self.editor.call(ATEN.sub.Tensor, self.facts[Rows].lengths, 1, before=before, like=before)
        return self.editor.call(ATEN.unsqueeze, less, 1, before=before, like=before)

    def every(self, before: fx.Node) -> fx.Node:
        """[B, S]: the prompt's own rows in the caller's order.

        Raises: UnsupportedCallError where the target does not read them all.
        """
        if ReadPositions in self.facts:
            raise UnsupportedCallError(
                "more than the last position's logits (or hidden states) were asked for, and "
                f"{self.request.pruning.name} reads only a part of the prompt: pass logits_to_keep=1 (generate() does)."
            )
        order = self.facts[Rows].order
        if order is not None:
            return self.editor.call(SPEC.unpack_index, order, before=before)
        return self.editor.call(SPEC.row_index, self.facts[Inputs].tokens, before=before)
