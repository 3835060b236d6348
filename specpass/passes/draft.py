"""DraftGraphs: a captured draft as two subgraphs, and how they are put in front of the target's graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import output_of
from specpass.methods.specpc import SpecPC
from specpass.passes.base import State


@dataclasses.dataclass
class DraftGraphs:
    """`prefill(ids, lengths, room, *params)` and `step(ids, position, *caches, *params)`, with the draft's tensors.

    With a `prompt` method, prefill also returns scores [B, S] of the prompt's tokens, and step takes rows [B, 1] and
    the prompt's lengths [B] behind `position` and returns its scores [B, P] beside the logits.
    """

    prefill: fx.GraphModule
    step: fx.GraphModule
    params: dict[str, Tensor]
    layers: int
    vocab: int
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 0.0
    seed: int = 0
    target_vocab: int | None = None
    prompt: SpecPC | None = None

    def insert(self, editor: Editor, state: State, ids: fx.Node, anchor: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """Insert prefill and L - 1 steps in front of `anchor`: lookahead ids [B, L], and scores [B, S] or None."""
        gm, graph = editor.gm, editor.graph
        params = self._lift(editor, state)
        out = self._insert_prefill(editor, state, ids, params, anchor)
        gm.add_submodule("draft_step", self.step)
        batch, size = ids.meta["val"].shape
        lengths = state.lengths
        room = state.lookahead
        with quiet(editor.mode):
            ended = editor.call(torch.ops.aten.zeros_like, lengths, before=anchor)
            ended = editor.call(torch.ops.aten.to.dtype, ended, torch.bool, before=anchor)
        caches = [editor.item(out, index + 1, anchor) for index in range(3 * self.layers)]
        logits = editor.item(out, 0, anchor)
        scores = None if self.prompt is None else editor.item(out, 3 * self.layers + 1, anchor)
        tokens: list[fx.Node] = []
        over = ended
        vocab = min(self.vocab, self.target_vocab or self.vocab)
        for index in range(state.lookahead):
            if index:
                position = editor.call(torch.ops.aten.add.Tensor, lengths, index - 1, before=anchor)
                position = editor.call(torch.ops.aten.unsqueeze, position, 1, before=anchor)
                extra = self._rows(editor, position, over, lengths, anchor)
                with graph.inserting_before(anchor):
                    out = logits = graph.call_module("draft_step", (tokens[-1], position, *extra, *caches, *params))
                with quiet(editor.mode):
                    out.meta["val"] = self._values(self.step, (batch, size, room))
                    if self.prompt is not None:  # its slots are a symbol of the step alone
                        slots = torch.empty(batch, size + room, device=ids.meta["val"].device)
                        out.meta["val"] = (out.meta["val"], slots)
                if self.prompt is not None:
                    logits, new = (editor.item(out, i, anchor) for i in (0, 1))
                    scores = editor.call(SPEC.merge_step, scores, new, self.reduce, before=anchor)
            pair = editor.call(
                SPEC.next_token,
                logits,
                ended,
                vocab,
                self.temperature,
                self.seed,
                index,
                list(self.eos_ids),
                self.pad_id,
                before=anchor,
            )
            over = ended  # whether a row had ended in front of this token, which is then none of its own
            token, ended = editor.item(pair, 0, anchor), editor.item(pair, 1, anchor)
            tokens.append(token)
        return editor.call(torch.ops.aten.cat, tokens, 1, before=anchor), scores

    def _insert_prefill(
        self, editor: Editor, state: State, ids: fx.Node, params: list[fx.Node], anchor: fx.Node
    ) -> fx.Node:
        """The call of the draft's prefill: logits, caches, and scores where there is a `prompt`."""
        editor.gm.add_submodule("draft_prefill", self.prefill)
        with editor.graph.inserting_before(anchor):
            out = editor.graph.call_module("draft_prefill", (ids, state.lengths, state.lookahead, *params))
        with quiet(editor.mode):
            out.meta["val"] = self._values(self.prefill, (*ids.meta["val"].shape, state.lookahead))
        return out

    @property
    def reduce(self) -> str:
        """Reduction over heads, rows, layers and steps: "mean" is a plain sum, only the order matters."""
        return "max" if self.prompt.reduce == "max" else "sum"  # type: ignore[union-attr]

    def _rows(
        self, editor: Editor, position: fx.Node, ended: fx.Node, lengths: fx.Node, anchor: fx.Node
    ) -> tuple[fx.Node, ...]:
        """What a scoring step takes besides: its row [B, 1], -1 where the sequence had ended, and the lengths [B]."""
        if self.prompt is None:
            return ()
        over = editor.call(torch.ops.aten.unsqueeze, ended, 1, before=anchor)
        return editor.call(torch.ops.aten.masked_fill.Scalar, position, over, -1, before=anchor), lengths

    def _lift(self, editor: Editor, state: State) -> list[fx.Node]:
        nodes = []
        last = editor.graph.find_nodes(op="placeholder")[-1]
        for name, tensor in self.params.items():
            with editor.graph.inserting_after(last):
                last = editor.graph.placeholder("draft_" + name.replace(".", "_"))
            with quiet(editor.mode):
                last.meta["val"] = editor.mode.from_tensor(tensor, static_shapes=True)
            state.lifted[last.target] = tensor
            nodes.append(last)
        return nodes

    @staticmethod
    def _values(gm: fx.GraphModule, sizes: tuple[Any, ...]) -> Any:
        """The subgraph's results for other sizes, from its own symbolic shapes: all of prefill's, step's logits."""
        symbols = gm.meta["specpass_symbols"]

        def restate(node: Any) -> Tensor:
            val = node.meta["val"]
            shape = [_evaluate(dim, symbols, sizes) for dim in val.shape]
            return torch.empty(shape, dtype=val.dtype, device=val.device)

        result = output_of(gm.graph).args[0]
        if not isinstance(result, (tuple, list)):
            return restate(result)
        return restate(result[0]) if len(result) == 2 else tuple(restate(node) for node in result)


def _evaluate(dim: Any, symbols: list[sympy.Symbol], sizes: tuple[Any, ...]) -> Any:
    if isinstance(dim, int):
        return dim
    return sympy.lambdify(symbols, dim.node.expr, modules=[{}])(*sizes)
