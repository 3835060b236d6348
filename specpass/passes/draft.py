"""DraftGraphs: a captured draft as two subgraphs, and how they are put in front of the target's graph."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, quiet
from specpass.graph.operands import results_of
from specpass.graph.walk import ATEN, value
from specpass.methods.specpc import SpecPC
from specpass.passes.facts import Drafted


@dataclasses.dataclass
class DraftGraphs:
    """`prefill(ids, lengths, room, *params)` and `step(ids, position, *caches, *params)`, with the draft's tensors.

    To go on behind the lookahead (see propose): `extend(ids [B, q], position [B, q], *caches, *params)`, logits of the
    last token, and `plain_step`, a step that does not score.

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
    extend: fx.GraphModule | None = None
    plain_step: fx.GraphModule | None = None
    futures: int = 1

    def insert(
        self, editor: Editor, lookahead: int, ids: fx.Node, lengths: fx.Node, anchor: fx.Node, room: Any = 0
    ) -> Drafted:
        """Insert prefill and L - 1 steps in front of `anchor`: lookahead ids [B, L], and scores [B, S] or None.

        Args: lookahead: L. ids: [B, S] packed. lengths: [B]. room: free slots behind the lookahead, a node or a count.
        """
        params, lifted = self._lift(editor)
        out = self._insert_prefill(editor, lookahead, ids, lengths, params, anchor, room)
        loop = _Unrolled(self, editor, lookahead, ids, lengths, params, anchor, value(room))
        ids, scores = loop.run(out)
        return Drafted(loop.first(ids), anchor, scores, lifted, tuple(loop.caches), ids if self.futures > 1 else None)

    def _insert_prefill(
        self,
        editor: Editor,
        lookahead: int,
        ids: fx.Node,
        lengths: fx.Node,
        params: list[fx.Node],
        anchor: fx.Node,
        room: Any = 0,
    ) -> fx.Node:
        """The call of the draft's prefill: logits, caches, and scores where there is a `prompt`."""
        editor.gm.add_submodule("draft_prefill", self.prefill)
        free = editor.call(operator.add, room, lookahead, before=anchor) if isinstance(room, fx.Node) else lookahead
        sizes = (*value(ids).shape, value(free))
        with quiet(editor.mode):
            values = tuple(restated(node, self.prefill, sizes) for node in results_of(self.prefill.graph))
        return editor.call_module("draft_prefill", ids, lengths, free, *params, before=anchor, val=values)

    @property
    def reduce(self) -> str:
        """Reduction over heads, rows, layers and steps: "mean" is a plain sum, only the order matters."""
        return "max" if self.prompt is None or self.prompt.reduce == "max" else "sum"

    @property
    def shared_vocab(self) -> int:
        """Ids that both models know: a family pads its vocabulary differently by size."""
        return min(self.vocab, self.target_vocab or self.vocab)

    def _lift(self, editor: Editor) -> tuple[list[fx.Node], dict[str, Tensor]]:
        """The draft's tensors as inputs of the target's graph, behind its own."""
        nodes, lifted = [], {}
        last = editor.graph.find_nodes(op="placeholder")[-1]
        for name, tensor in self.params.items():
            with editor.graph.inserting_after(last):
                last = editor.graph.placeholder("draft_" + name.replace(".", "_"))
            with quiet(editor.mode):
                last.meta["val"] = editor.mode.from_tensor(tensor, static_shapes=True)
            lifted[str(last.target)] = tensor
            nodes.append(last)
        return nodes, lifted


@dataclasses.dataclass
class _Unrolled:
    """The draft's tokens, one call of `draft_step` for each but the first.

    Several futures are rows of one batch [B * M], a prompt's side by side, each with a copy of its caches.
    """

    draft: DraftGraphs
    editor: Editor
    lookahead: int
    ids: fx.Node
    lengths: fx.Node
    params: list[fx.Node]
    anchor: fx.Node
    room: Any = 0
    caches: list[fx.Node] = dataclasses.field(default_factory=list)

    def run(self, prefill: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """From the prefill's results: lookahead ids [B, M L], scores or None."""
        draft, editor, anchor = self.draft, self.editor, self.anchor
        if self.lookahead > 1:  # the first token is the prefill's
            editor.gm.add_submodule("draft_step", draft.step)
        self.lengths = self._each(self.lengths)
        ended = editor.call(ATEN.zeros_like, self.lengths, before=anchor)
        ended = over = editor.call(ATEN.to.dtype, ended, torch.bool, before=anchor)
        count = 3 * draft.layers
        caches = self.caches = [self._each(editor.item(prefill, index + 1, anchor)) for index in range(count)]
        logits = self._each(editor.item(prefill, 0, anchor))
        scores = None if draft.prompt is None else editor.item(prefill, count + 1, anchor)
        tokens: list[fx.Node] = []
        for index in range(self.lookahead):
            if index:
                logits, new = self._step(tokens[-1], index, over, caches)
                if new is not None:
                    scores = editor.call(SPEC.merge_step, scores, new, draft.reduce, before=anchor)
            pair = editor.call(*self._chosen(logits, ended, index), before=anchor)
            over = ended  # whether a row had ended in front of this token, which is then none of its own
            token, ended = editor.item(pair, 0, anchor), editor.item(pair, 1, anchor)
            tokens.append(token)
        ids = editor.call(ATEN.cat, tokens, 1, before=anchor)
        if draft.futures > 1:
            ids = editor.call(ATEN.reshape, ids, [-1, draft.futures * self.lookahead], before=anchor)
        return ids, scores

    def first(self, ids: fx.Node) -> fx.Node:
        """[B, L], the first of the futures [B, M L]."""
        if self.draft.futures == 1:
            return ids
        return self.editor.call(ATEN.slice.Tensor, ids, 1, 0, self.lookahead, before=self.anchor)

    def _each(self, node: fx.Node) -> fx.Node:
        """[B * M, ...] of [B, ...]: one for each future."""
        if self.draft.futures == 1:
            return node
        return self.editor.call(ATEN.repeat_interleave.self_int, node, self.draft.futures, 0, before=self.anchor)

    def _chosen(self, logits: fx.Node, ended: fx.Node, index: int) -> tuple[Any, ...]:
        """The operator that chooses the next tokens, and its operands."""
        draft = self.draft
        stop = (list(draft.eos_ids), draft.pad_id)
        if draft.futures > 1:
            return SPEC.next_tokens, logits, ended, draft.futures, draft.shared_vocab, *stop
        return SPEC.next_token, logits, ended, draft.shared_vocab, draft.temperature, draft.seed, index, *stop

    def _step(self, token: fx.Node, index: int, over: fx.Node, caches: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
        """Logits of the token behind `token`, and the step's scores [B, P] where the draft scores."""
        draft, editor, anchor = self.draft, self.editor, self.anchor
        position = editor.call(ATEN.add.Tensor, self.lengths, index - 1, before=anchor)
        position = editor.call(ATEN.unsqueeze, position, 1, before=anchor)
        batch, size = value(self.lengths).shape[0], value(self.ids).shape[1]
        with quiet(editor.mode):
            val: Any = restated(results_of(draft.step.graph)[0], draft.step, (batch, size, self.lookahead))
            if draft.prompt is not None:  # its slots are a symbol of the step alone
                val = (val, torch.empty(batch, size + self.lookahead + self.room, device=val.device))
        extra = self._rows(position, over)
        operands = (token, position, *extra, *caches, *self.params)
        out = editor.call_module("draft_step", *operands, before=anchor, val=val)
        if draft.prompt is None:
            return out, None
        return editor.item(out, 0, anchor), editor.item(out, 1, anchor)

    def _rows(self, position: fx.Node, ended: fx.Node) -> tuple[fx.Node, ...]:
        """What a scoring step takes besides: its row [B, 1], -1 where the sequence had ended, and the lengths [B]."""
        if self.draft.prompt is None:
            return ()
        over = self.editor.call(ATEN.unsqueeze, ended, 1, before=self.anchor)
        rows = self.editor.call(ATEN.masked_fill.Scalar, position, over, -1, before=self.anchor)
        return rows, self.lengths


def restated(node: fx.Node, gm: fx.GraphModule, sizes: tuple[Any, ...]) -> Tensor:
    """The result `node` of the subgraph for other sizes (B, S, room), from its own symbolic shape."""
    symbols, val = gm.meta["specpass_symbols"], value(node)
    shape = [evaluated(dim, symbols, sizes) for dim in val.shape]
    return torch.empty(shape, dtype=val.dtype, device=val.device)


def evaluated(dim: Any, symbols: list[sympy.Symbol], sizes: tuple[Any, ...]) -> Any:
    """A size of the subgraph with `sizes` in its symbols' place."""
    if isinstance(dim, int):
        return dim
    return sympy.lambdify(symbols, dim.node.expr, modules=[{}])(*sizes)
