"""Attention of several sequences of one prompt, whose pruned keys and values are stored and read once."""

from __future__ import annotations

from torch import fx

from specpass.dialect.attention import Attend
from specpass.dialect.define import Operator


class AttendCascade(
    Operator,
    schema="attend_cascade(Tensor query, Tensor keys, Tensor values, Tensor lengths, Tensor[] prompt, float scale, "
    "float softcap=0.0, Tensor? sinks=None, int sliding=0, int chunk=0, int layers=1) -> Tensor",
    since="PRUNED",
):
    """`attend` where B prompts have n = R / B sequences each, which stand side by side: [R, H, q, Dv].

    In front of a sequence's own slots stand those of its `prompt`: keys [B, K, C, D], values [B, K, C, Dv] and counts
    [B, K] of the slots in use. Where heads have budgets of their own, keys [B, T, D], values, counts and starts [B, K],
    and the heads of so many `layers` lie in them.
    """

    query: fx.Node  # [R, H, q, D]
    keys: fx.Node  # [R, K, N, D]
    values: fx.Node  # [R, K, N, Dv]
    lengths: fx.Node  # [R, K] of a sequence's own
    prompt: list[fx.Node]
    scale: float
    softcap: float
    sinks: fx.Node | None
    sliding: int
    chunk: int
    layers: int

    @staticmethod
    def fake(query, keys, values, *rest):
        return query.new_empty(*query.shape[:3], values.shape[-1])


def attend_of(node: fx.Node) -> Attend | AttendCascade:
    """A step's attention over slots, of a prompt of its own or a shared one. Raises: TypeError: something else."""
    return Attend.match(node) or AttendCascade.of(node)
