"""The draft's decode steps as one loop: in ONNX a Loop whose body is one step, however many tokens it looks ahead.

torch.compile calls one compiled step L - 1 times; ONNX has no calls, so unrolled steps would be L - 1 copies of the
draft's nodes (figures: docs/onnx.md). A sampling draft (temperature > 0) stays unrolled: its noise depends on the
step's number, a constant of each copy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from specpass.export.flatten import Inliner
from specpass.export.forms import by_head
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import value
from specpass.ops.draft import next_token
from specpass.ops.prompt import merge_step
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Drafted


@dataclasses.dataclass
class LoopedDraft(DraftGraphs):
    """DraftGraphs whose steps are inserted as one node."""

    def insert(
        self, editor: Editor, lookahead: int, ids: fx.Node, lengths: fx.Node, anchor: fx.Node, room: Any = 0
    ) -> Drafted:
        """As DraftGraphs.insert; an exported draft goes on no further, so `room` is 0."""
        if self.temperature > 0 or lookahead == 1:
            return super().insert(editor, lookahead, ids, lengths, anchor, room)
        params, lifted = self._lift(editor)
        out = self._insert_prefill(editor, lookahead, ids, lengths, params, anchor)
        editor.gm.add_submodule("draft_steps", DraftSteps(self, lookahead))
        values = [editor.item(out, index, anchor) for index in range(len(value(out)))]
        like = value(ids)
        with quiet(editor.mode):
            val: tuple[Tensor, ...] = (torch.empty(like.shape[0], lookahead, dtype=torch.int64, device=like.device),)
            if self.prompt is not None:
                val += (torch.empty(like.shape, device=like.device),)
        steps = editor.call_module("draft_steps", lengths, *values, *params, before=anchor, val=val)
        scores = None if self.prompt is None else editor.item(steps, 1, anchor)
        return Drafted(editor.item(steps, 0, anchor), anchor, scores, lifted)


class DraftSteps(nn.Module):
    """L tokens from the draft's prefill on: (lengths [B], logits, caches, [scores], params) -> ids [B, L], [scores]."""

    def __init__(self, draft: LoopedDraft, length: int) -> None:
        super().__init__()
        self.draft, self.length = draft, length

    def inline(self, lengths: Tensor, logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Called under make_fx by an Inliner."""
        draft, length, count = self.draft, self.length, 3 * self.draft.layers
        scored = draft.prompt is not None
        caches, rest = rest[:count], rest[count:]
        scores, params = rest[: int(scored)], rest[int(scored) :]
        heads = caches[2::3]
        storage = [
            by_head(states, owner.shape[1])
            for index, owner in enumerate(heads)
            for states in caches[3 * index : 3 * index + 2]
        ]
        ended = torch.zeros_like(lengths, dtype=torch.bool)
        token, after = self._next(logits, ended)
        ids = torch.cat([token, token.new_zeros(token.shape[0], length - 1)], 1)
        index = torch.ones((), dtype=torch.int64, device=lengths.device)
        carried = (index, token, ended, after.clone(), ids, *scores, *storage)

        def proceed(index: Tensor, *_: Tensor) -> Tensor:
            return index < length

        def step(
            index: Tensor, token: Tensor, over: Tensor, ended: Tensor, ids: Tensor, *rest: Tensor
        ) -> tuple[Tensor, ...]:
            """One token more; `over` says which rows had ended in front of `token`."""
            scores, rest = rest[: int(scored)], rest[int(scored) :]
            storage, (lengths, *params) = rest[: 2 * draft.layers], rest[2 * draft.layers :]
            position = (lengths + index - 1)[:, None]
            extra = (position.masked_fill(over[:, None], -1), lengths) if scored else ()
            out, stored = self._step(token, position, extra, storage, lengths + index - 1, params)
            logits, *new = out if scored else (out,)
            if scored:
                scores = (merge_step(scores[0], new[0], draft.reduce),)
            following, after = self._next(logits, ended)
            column = torch.arange(length, device=ids.device) == index
            ids = torch.where(column, following, ids)
            return (index + 1, following, ended.clone(), after.clone(), ids, *scores, *stored)

        done = torch.ops.higher_order.while_loop(proceed, step, carried, (lengths, *params))
        return (done[4], *done[5 : 5 + int(scored)])

    def _next(self, logits: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        draft = self.draft
        return next_token(logits, ended, draft.shared_vocab, 0.0, draft.seed, 0, list(draft.eos_ids), draft.pad_id)

    def _step(
        self,
        token: Tensor,
        position: Tensor,
        extra: tuple[Tensor, ...],
        storage: tuple[Tensor, ...],
        used: Tensor,
        params: list[Tensor],
    ) -> tuple[Any, list[Tensor]]:
        """The step's graph on caches of `used` [B] slots; returns its result and the storages one token longer."""
        gm = self.draft.step
        inner = Inliner(gm)
        args = [token, position, *extra]
        places = gm.graph.find_nodes(op="placeholder")[len(args) :]
        stored = []
        for index in range(self.draft.layers):
            pair = storage[2 * index : 2 * index + 2]
            args += [states.flatten(1, 2) for states in pair]
            args.append(used[:, None].expand(-1, pair[0].shape[1]))
            for place, states in zip(places[3 * index :], pair, strict=False):
                inner.stores[place] = states
                stored.append(place)
        out = inner.run(*args, *params)
        return out, [inner.stores[place] for place in stored]
