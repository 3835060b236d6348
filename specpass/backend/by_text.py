"""A draft with another tokenizer reads a prompt's text, in front of the compiled call.

Tokenizers need text, and graphs hold ids: so the prompt's ids become text on the host, the draft's two graphs read and
continue it in its own tokens, uncompiled, and the target's graph takes what they give, in its own tokens, as inputs:

    ids --text--> the draft's ids --> L tokens or more --text--> lookahead ids [B, L] of the target
                                  --> scores [B, S'] --spans--> scores [B, S] of the target's tokens (SpecPC)

The draft's last W tokens and its first L score, as ever; it writes on until the target has L of its own, four times L
at most. The text's last token is left out, since it may be half a word, unless the draft has ended. A text of fewer
tokens ends with the target's EOS, as a draft's own does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend.compile import OTHER_TOKENIZER, Backend
from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import check_prompt
from specpass.capture.devices import device_of
from specpass.errors import (
    DraftContextError,
    FuturesError,
    SpeculationError,
    TokenizerMismatchError,
    UnsupportedCallError,
)
from specpass.interpret.beside import features
from specpass.interpret.draft import Written, steps_by_forward, steps_by_graphs
from specpass.interpret.rows import Packing
from specpass.parallel.agree import first_ranks
from specpass.passes.draft import DraftGraphs
from specpass.retokenize import Reading, TokenizerPair
from specpass.rewrite import Refusal
from specpass.sizes import context_length, eos_ids, pad_id

MOST = 4  # tokens that the draft writes at most for each of the target's
NOTE = "the draft has another tokenizer: it reads the prompt's text, in front of the graph, and its own is re-encoded"


class DraftByText:
    """The draft of `backend`, for prompts of `target`.

    Args: tokenizers: the target's and the draft's.

    Raises: TokenizerMismatchError, SpeculationError, GeneratedError, FuturesError: what cannot go with two tokenizers.
    """

    def __init__(self, backend: Backend, target: nn.Module, tokenizers: Any) -> None:
        if not isinstance(tokenizers, (tuple, list)) or len(tokenizers) != 2:
            raise TokenizerMismatchError(
                f"tokenizers={type(tokenizers).__name__}: expected two, (the target's, the draft's)."
            )
        if backend.draft is None or not backend.method.needs_draft:
            raise TokenizerMismatchError(
                f"tokenizers were given, and {backend.method.name} has no draft here that would read a text: leave "
                "them out."
            )
        if backend.speculate:
            raise SpeculationError(
                f"speculate={backend.speculate} proposes the draft's tokens as they are, and its tokenizer is another: "
                "leave speculate out, or use a draft of the same family."
            )
        if backend.bound is not None:
            backend.bound.check_foresees(OTHER_TOKENIZER)
        if backend.method.futures > 1:
            raise FuturesError(
                f"futures={backend.method.futures}: a draft with another tokenizer writes one text: leave futures out, "
                "or use a draft of the same family."
            )
        self.backend, self.draft, self.pair = backend, backend.draft, TokenizerPair(*tokenizers)
        config = getattr(target, "generation_config", None) or target.config
        ends, own = eos_ids(config), self.pair.target.eos_token_id
        if not ends and own is not None:
            ends = (own,)
        self.pad = pad_id(config)
        self.end = ends[0] if ends else self.pad
        self.draft_ends = frozenset(eos_ids(self.draft.generation_config))
        backend.eos_of_text = ends

    def __call__(self, cache: BudgetCache, call: dict[str, Any]) -> None:
        """Hand the lookahead, and scores, of the call's prompt to `cache`, unless it fits or ids were given.

        Raises: UnsupportedCallError: no ids, or features beside them. MaskError, DraftContextError.
        """
        ids = call.get("input_ids")
        self.backend.check_cache(cache)
        if cache.given_ids is not None or (ids is not None and cache.early_exit and ids.shape[1] <= cache.whole):
            return
        if ids is None or features(call):
            what = "inputs_embeds" if ids is None else features(call)[0]
            fix = "input_ids alone" if cache.compresses else "lookahead_ids=[B, L] token ids with it"
            raise UnsupportedCallError(
                f"the prompt comes with {what}, and a draft with another tokenizer reads text alone: pass {fix}, or "
                "use a draft of the same family."
            )
        mask = call.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        check_prompt(cache, (ids.shape[0], ids.shape[1]), mask, cache.lookahead, None)
        packing = Packing.of(ids, mask)
        rows = zip(packing.ids(ids).tolist(), packing.lengths.tolist(), strict=True)
        readings = [self.pair.read(row[:length]) for row, length in rows]
        with torch.no_grad():
            written = self._written(cache, readings, device_of(self.draft))
        cut = cache.method.appends  # the last token may be half a word
        ahead = [self._ahead(reading, row, cut) for reading, row in zip(readings, written.ids.tolist(), strict=True)]
        rows_ahead = [self._filled(row, cache.lookahead) for row in ahead]
        self.backend.report.note(NOTE)
        scores = self._carried(readings, written.scores, ids)
        taken = first_ranks(torch.tensor(rows_ahead, device=ids.device), self.backend.ranks).to("cpu")
        cache.take(taken, None if scores is None else first_ranks(scores, self.backend.ranks))

    def _written(self, cache: BudgetCache, readings: list[Reading], device: torch.device) -> Written:
        """What the draft writes [B, n], and its scores of its own tokens behind the first L."""
        length, longest = cache.lookahead, max(len(reading.ids) for reading in readings)
        if min(len(reading.ids) for reading in readings) == 0:
            raise UnsupportedCallError("a prompt holds no text that the draft's tokenizer could read.")
        context = context_length(self.draft.config)
        if context is not None and longest + length > context:
            raise DraftContextError(
                f"the prompt has {longest} tokens of the draft's and the draft writes {length} more, but it reads at "
                f"most {context}: shorten the prompt, lower lookahead, or use a draft with a longer context."
            )
        most = MOST * length if cache.method.appends else length  # nobody reads what SpecPC's draft writes
        most = most if context is None else min(most, context - longest)
        steps: list[Written] = []
        for step in self._steps(cache, readings, longest, most, device):
            steps.append(step)
            if len(steps) >= length:
                tokens = torch.cat([step.ids for step in steps], 1).tolist()
                if all(self._enough(*pair, length) for pair in zip(readings, tokens, strict=True)):
                    break
        return Written(torch.cat([step.ids for step in steps], 1), steps[length - 1].scores)

    def _steps(
        self, cache: BudgetCache, readings: list[Reading], longest: int, most: int, device: torch.device
    ) -> Iterator[Written]:
        """By the draft's graphs; by its own forward where it has none.

        Raises: UnsupportedCallError: its attention is needed, and it has none.
        """
        lengths = torch.tensor([len(reading.ids) for reading in readings], device=device)
        vocab, method = len(self.pair.draft), cache.method
        try:
            graphs: DraftGraphs = self.backend.draft_graphs(cache, vocab=vocab)
        except Refusal as refusal:
            if cache.compresses:
                raise UnsupportedCallError(
                    f"{method.name} needs the draft's attention, and {refusal}: use SpecKV, or another draft."
                ) from refusal
            self.backend.report.note(f"the draft's own forward writes, token by token: {refusal}")
            rows = padded([[0] * (longest - len(reading.ids)) + reading.ids for reading in readings], device)
            mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
            yield from steps_by_forward(self.draft, rows, mask, most, vocab, method.temperature, method.seed, {})
            return
        rows = padded([reading.ids + [0] * (longest - len(reading.ids)) for reading in readings], device)
        yield from steps_by_graphs(graphs, rows, lengths, most)

    def _enough(self, reading: Reading, written: list[int], length: int) -> bool:
        """Whether the target has L tokens of what a row's draft wrote, or it has ended."""
        return self._until_end(written)[1] or len(self.pair.ahead(reading, written)) > length

    def _until_end(self, written: Iterable[int]) -> tuple[list[int], bool]:
        """Tokens in front of the draft's EOS, and whether there was one."""
        tokens: list[int] = []
        for token in written:
            if token in self.draft_ends:
                return tokens, True
            tokens.append(token)
        return tokens, False

    def _ahead(self, reading: Reading, written: list[int], cut: bool) -> list[int]:
        """The target's tokens of what a row's draft wrote. Args: cut: without the last, unless the draft had ended."""
        tokens, ended = self._until_end(written)
        found = self.pair.ahead(reading, tokens)
        return found[:-1] or found if cut and not ended else found

    def _filled(self, row: list[int], length: int) -> list[int]:
        """L tokens: the first of them, or all and the target's EOS."""
        return [*row, self.end, *[self.pad] * length][:length]

    def _carried(self, readings: list[Reading], scores: Tensor | None, ids: Tensor) -> Tensor | None:
        """[B, S] of the target's packed tokens, from the draft's scores [B, S']."""
        if scores is None:
            return None
        carried = torch.zeros(ids.shape, dtype=scores.dtype, device=ids.device)
        for row, reading in enumerate(readings):
            carried[row, : reading.pairs.count] = reading.pairs.carry(scores[row])
        return carried


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
