"""Verified lookahead without torch: the answer's first tokens by logits that the prompt's prefill has computed.

As in a compiled model (specpass/cache/replay.py): the lookahead's keys and values wait behind the slots in use, and
while the tokens follow it a step is known logits and one slot more.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LOOKAHEAD_LOGITS = "lookahead_logits"  # the prefill's result [B, L, V]


@dataclasses.dataclass
class Replay:
    """`ids` [B, L] lookahead tokens and the `logits` [B, L, V] behind each; `follows` [B], `used` tokens followed."""

    ids: np.ndarray
    logits: np.ndarray
    follows: np.ndarray
    used: int = 0

    @classmethod
    def of(cls, ids: np.ndarray, logits: np.ndarray) -> Replay:
        return cls(ids, logits, np.ones(len(ids), dtype=bool))

    def take(self, tokens: np.ndarray) -> np.ndarray:
        """Rows [B] whose next token [B] is the lookahead's; the others have left it from now on."""
        self.follows = self.follows & (self.ids[:, self.used] == tokens)
        self.used += 1
        return self.follows

    @property
    def known(self) -> np.ndarray:
        """Logits [B, V] behind the last token taken."""
        return self.logits[:, self.used - 1]

    @property
    def over(self) -> bool:
        """Whether no row can follow further."""
        return self.used == self.ids.shape[1] or not self.follows.any()
