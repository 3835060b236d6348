"""SpecKV: a lookahead scores the prompt: a draft's, one of the prompt itself, or the target's own cheap one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from specpass.errors import BudgetError, FuturesError, LookaheadError
from specpass.methods.base import DRAFTLESS, NGRAM, SELF, Scored, check_count, check_temperature


@dataclasses.dataclass(frozen=True)
class SpecKV(Scored):
    """The target keeps the KV pairs that the window and the L lookahead tokens attend to.

    Args:
        budget: KV slots C per KV head and layer, or a ratio of the prompt length; "auto": chosen for each prompt.
        window: the last W prompt tokens are always kept and always score.
        lookahead: L tokens that the draft writes, as many as you like; None means min(32, max_new_tokens). "ngram": as
            many as with None, and no draft: those that followed the prompt's last eight tokens, or as many of these as
            can be found, where they stood in it before (prompt lookup, see specpass.ops.draft.prompt_lookup). "self":
            as many, and no draft: the target writes them from the `budget` slots that SnapKV would keep of the prompt,
            and all of the prompt's keys and values are held until their rows have scored (LAQ, arXiv 2505.20334).
        reduce: "max" or "mean", over rows and over the query heads of a KV head.
        pool: "max" or "avg", along the sequence.
        kernel: odd width of the pooling.
        temperature: 0.0 drafts greedily; above, who writes the lookahead samples from a counter-based generator.
        seed: of that generator.
        lookahead_ids: [B, L] token ids that take the draft's place; no draft is needed then.
        verify: while the answer is the lookahead, its logits are those that the target's prefill computed there, with
            all KV, and cost nothing; False: each token is decoded from the pruned cache.
        spread: "uniform", C slots for each KV head, or "heads", K * C slots for the K heads of a layer together
            (Ada-SpecKV, arXiv 2407.11550): each keeps its window and a fifth of C - W at least, and the best scores of
            all heads the rest; or "global", where the heads of all layers share. Memory is the same, exactly; until the
            last layer has read the prompt, "global" holds up to three times as much.
        share: of the attention of the W + L rows, in the mean over rows, heads and layers: each prompt gets the least
            budget of 128, 256, 512, ..., 4096 that keeps as much, and `budget` at most. "auto" stands for 4096, with
            0.95. None: every prompt gets `budget`.
        value_norms: scores are weighed by the norms of the positions' values (arXiv 2406.12335); False in the paper.
        reconstruction: a score is how far the outputs of the rows that score would move without a position, and not
            the attention that it gets (ReST-KV, arXiv 2605.08840, without its smoothing); False in the paper.
        futures: M branches of L tokens that the draft writes, by diverse beam search (arXiv 1610.02424, see
            specpass.ops.draft.next_tokens): the first is its greedy lookahead, the others take less likely tokens where
            it hesitates. The rows of all of them score, each seeing the prompt and its own branch. The paper has 1.
        sparse_prefill: V columns: each query of a prompt of more than 2 V tokens (lookahead included) reads the V that
            score highest for its KV head, and its own last V positions; those that score read all. The draft reads its
            prompt likewise. The paper has 2048. 0: exact attention. Logits are then no longer those of full KV.

    Source: arXiv 2506.08373, Algorithm 1.
    """

    lookahead: int | str | None = None
    temperature: float = 0.0
    seed: int = 0
    lookahead_ids: tuple[tuple[int, ...], ...] | None = None
    verify: bool = True
    sparse_prefill: int = 0
    futures: int = dataclasses.field(default=1, kw_only=True)

    drafts: ClassVar[bool] = True
    appends: ClassVar[bool] = True
    recommended: ClassVar[Mapping[str, Any]] = {"spread": "global", "reconstruction": True}  # see bench/budgets.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lookahead, str) and self.lookahead not in DRAFTLESS:
            raise BudgetError(f"lookahead={self.lookahead!r}: expected a number of tokens, {NGRAM!r} or {SELF!r}.")
        if self.lookahead not in (None, *DRAFTLESS):
            check_count("lookahead", self.lookahead, 1)
        check_temperature(self.temperature)
        check_count("sparse_prefill", self.sparse_prefill, 0)
        if self.lookahead_ids is not None:
            rows = as_id_rows(self.lookahead_ids)
            object.__setattr__(self, "lookahead_ids", rows)
            if self.lookahead not in (None, len(rows[0])):
                raise LookaheadError(
                    f"lookahead={self.lookahead!r} but lookahead_ids has {len(rows[0])} tokens a row; leave one out."
                )
            object.__setattr__(self, "lookahead", len(rows[0]))
        self._check_futures()

    def _check_futures(self) -> None:
        """Raises: FuturesError: there is one future, by what else was chosen."""
        check_count("futures", self.futures, 1)
        if self.futures == 1:
            return
        reasons = (
            (self.looks_up, f"lookahead={self.lookahead!r} copies one", "give lookahead as a count"),
            (self.writes_itself, f"lookahead={self.lookahead!r} writes one", "give lookahead as a count"),
            (self.lookahead_ids is not None, "lookahead_ids are one", "leave lookahead_ids out"),
            (self.temperature > 0, f"temperature={self.temperature} samples one", "leave temperature out"),
            (self.sparse_prefill > 0, f"sparse_prefill={self.sparse_prefill} reads one", "leave sparse_prefill out"),
            (self.prompt is not None, f"{self.name} follows one", "use SpecKV"),
            (self.score is not None, f"{self.name} scores one by a function of its own", "use SpecKV's scores"),
        )
        for found, reason, fix in reasons:
            if found:
                raise FuturesError(f"futures={self.futures}, and {reason}: {fix}, or leave futures out.")


def as_id_rows(ids: Any) -> tuple[tuple[int, ...], ...]:
    """[B, L] token ids (a tensor or nested sequences) as nested tuples.

    Raises:
        LookaheadError: not two-dimensional, empty, or rows of different lengths.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Sequence) for row in rows):
        raise LookaheadError(f"lookahead_ids={ids!r}: expected [B, L] token ids.")
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise LookaheadError(f"lookahead_ids has rows of lengths {sorted(lengths)}: expected one length L >= 1.")
    return tuple(tuple(int(token) for token in row) for row in rows)
