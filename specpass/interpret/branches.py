"""Several futures behind what was read before: none of them sees the others. What graphs do in attend_branches.

Columns of a call are the model's own: what was read before, the tokens of the call, and M futures of L tokens each.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specpass.interpret.rows import Packing
from specpass.interpret.watch import SDPA, Attention
from specpass.kernels.attention import visible
from specpass.sizes import FULL, Span


@dataclasses.dataclass(frozen=True)
class Branches:
    """The last `count` tokens of each row, and M `futures` of L = `length` tokens behind them: Q rows of T columns.

    Args: packing: of these columns, padding in front.
    """

    packing: Packing
    count: int
    length: int
    futures: int
    known: dict[Span, Tensor] = dataclasses.field(default_factory=dict)

    def positions(self, first: Tensor) -> Tensor:
        """[B, Q]: each future goes on from the last token. Args: first [B, 1]: the position of the first row."""
        own = torch.arange(self.count, device=first.device)
        ahead = self.count + torch.arange(self.length, device=first.device).repeat(self.futures)
        return first + torch.cat([own, ahead])

    def attend(self, call: Attention, span: Span) -> Attention:
        """The call, in which rows read the prompt and their own future."""
        query, key, value = call.query, call.key, call.value
        mask, grouped = self.seen(key.shape[2], span)[:, None], query.shape[1] != key.shape[1]
        options = {"attn_mask": mask, "scale": call.scale, "enable_gqa": grouped}
        return dataclasses.replace(call, run=lambda: SDPA(query, key, value, **options))

    def seen(self, columns: int, span: Span) -> Tensor:
        """[B, Q, T] bool: which of T `columns` each row reads."""
        if span not in self.known:
            lengths, order = self.packing.lengths, self.packing.order
            rows = torch.arange(-self.count, self.length * self.futures, device=lengths.device)
            rows = (rows + lengths[:, None]).clamp(min=0)
            seen = visible(rows, columns, lengths, self.length, span.sliding, span.chunk)
            if order is not None:
                seen = torch.zeros_like(seen).scatter(2, order[:, None].expand_as(seen), seen)
            self.known[span] = seen
        return self.known[span]

    def sums(self, call: Attention, query: Tensor, rows: Tensor) -> Tensor:
        """[B, H, R] float32: the log-sum-exp of queries [B, H, R, D] that stand at `rows` [B, R] of the call."""
        key, found = call.key, []
        seen = self.seen(key.shape[2], FULL)
        seen = seen.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, seen.shape[2]))[:, None]
        for own, states in zip(query.chunk(key.shape[1], 1), key.unbind(1), strict=True):  # logits are [B, G, R, T]
            logits = torch.matmul(own.float(), states[:, None].float().transpose(2, 3)) * call.scale
            found.append(logits.masked_fill(~seen, float("-inf")).logsumexp(-1))
        return torch.cat(found, 1)
