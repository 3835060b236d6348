"""SpecPC for an engine of somebody else's: token ids in, those that the target is to read out.

    ids --> the draft's prefill, compiled --> scores [1, S] --> the top C, sorted --> ids[positions]

The same graphs and operators as in front of a compiled target; the target itself is not needed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend import checks
from specpass.capture.devices import device_of
from specpass.capture.draft import capture_draft
from specpass.dialect.define import SPEC
from specpass.errors import DraftContextError, UnsupportedCallError
from specpass.graph.edit import copy_module
from specpass.interpret.draft import write_by_graphs
from specpass.lowering.lower import lower_draft, prepare
from specpass.methods.base import Method
from specpass.methods.specpc import SpecPC
from specpass.passes.draft import DraftGraphs
from specpass.passes.pipeline import fingerprint
from specpass.rewrite import Refusal
from specpass.sizes import context_length


@dataclasses.dataclass(frozen=True)
class Shortened:
    """What the target reads of a prompt.

    Attributes:
        ids: its C tokens, or all S where S <= C.
        positions: where they stand in the prompt, ascending.
    """

    ids: list[int]
    positions: list[int]


class PromptCompressor:
    """A draft that shortens prompts, for a target that runs elsewhere: SpecPC's first half.

    Safe to call from several threads: one prompt is read at a time.

    Args:
        draft: a Hugging Face decoder in eval mode, with the target's tokenizer.
        method: SpecPC, with positions="renumber": an engine numbers what it is given.
        lowering: "inductor", or "eager": the same graph without a compiler.

    Raises:
        UnsupportedCallError: another method, or a draft whose attention is not understood.
        MissingDraftError: no draft is given.
        GradientsError: the draft is in training mode.
        FirstLayerError: the draft has no layer of that number.
        SeveralDevicesError: the draft is spread over several devices.
    """

    def __init__(self, draft: nn.Module, method: Method, *, lowering: str = "inductor") -> None:
        checks.check_method(method)
        if not isinstance(method, SpecPC):
            raise UnsupportedCallError(
                f"{method.name} prunes the target's KV cache, which is another engine's here; SpecPC alone needs "
                "nothing but token ids: pass specpass.SpecPC(budget=1024)."
            )
        if method.positions != "renumber":
            raise UnsupportedCallError(
                f"positions={method.positions!r}: an engine numbers the tokens that it is given from 0: leave it out."
            )
        checks.check_lowering(lowering)
        checks.check_draft(draft, method)
        checks.check_one_device("draft", draft)
        prepare(lowering)
        self.draft, self.method, self.lowering = draft, method, lowering
        try:
            self._graphs = capture_draft(draft, method)
        except Refusal as refusal:
            raise UnsupportedCallError(f"the draft cannot score a prompt: {refusal}: use another draft.") from refusal
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, ids: Sequence[int], budget: int | float | None = None) -> Shortened:
        """Shorten one prompt.

        Args:
            ids: its S tokens, without padding.
            budget: tokens, or a ratio of S, in the method's place.

        Raises:
            BudgetError: not such a budget, or none that is larger than the window.
            DraftContextError: the prompt is longer than what the draft can read.
        """
        method = self.method if budget is None else dataclasses.replace(self.method, budget=budget)
        count, length = method.resolve(len(ids)).budget, len(ids)
        assert isinstance(count, int), "SpecPC chooses none by the prompt"
        if length <= count:
            return Shortened(list(ids), list(range(length)))
        most = context_length(self.draft.config)
        if most is not None and length + method.lookahead > most:
            raise DraftContextError(
                f"the prompt has {length} tokens and the draft writes {method.lookahead} more, but it reads at most "
                f"{most}: shorten the prompt, or use a draft with a longer context."
            )
        device = device_of(self.draft)
        packed, lengths = torch.tensor([list(ids)], device=device), torch.tensor([length], device=device)
        with self._lock, torch.no_grad():
            scores = self._scores(packed, lengths)
            how = (count, method.window, method.kernel, method.neighbours, method.pool)
            positions = SPEC.select_prompt(scores, lengths, *how)[0]
        kept = positions[positions >= 0].tolist()
        return Shortened([ids[position] for position in kept], kept)

    def _scores(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[1, S]; compiled at the first prompt, for any S."""
        method, graphs = self.method, self._graphs
        if self._compiled is None:
            prefill = copy_module(graphs.prefill)
            prefill.meta.update(graphs.prefill.meta)
            sizes = (ids, lengths, method.lookahead, *graphs.params.values())
            self._compiled = lower_draft(prefill, self.lowering, sizes, fingerprint=fingerprint(()), kind="prefill")
        compiled: Any = dataclasses.replace(
            graphs, prefill=self._compiled, temperature=method.temperature, seed=method.seed
        )
        running: DraftGraphs = compiled
        written = write_by_graphs(running, ids, lengths, method.lookahead)
        assert written.scores is not None, "captured to score"
        return written.scores
