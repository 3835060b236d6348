"""What looks ahead of a prompt: a draft's next token, or tokens of the prompt itself."""

from __future__ import annotations

import torch
from torch import fx

from specpass.dialect.define import Operator


class NextToken(
    Operator,
    schema="next_token(Tensor logits, Tensor ended, int vocab, float temperature, int seed, int step, int[] eos_ids, "
    "int pad_id) -> (Tensor, Tensor)",
    since="DRAFTED",
):
    """A draft's next token of each row [B, 1], and which rows have ended [B]."""

    logits: fx.Node  # [B, M, V]
    ended: fx.Node  # [B] bool
    vocab: int
    temperature: float
    seed: int
    step: int
    eos_ids: list[int]
    pad_id: int

    @staticmethod
    def fake(logits, ended, *rest):
        return ended.new_empty(ended.shape[0], 1, dtype=torch.int64), torch.empty_like(ended)


class NextTokens(
    Operator,
    schema="next_tokens(Tensor logits, Tensor ended, int futures, int vocab, int[] eos_ids, int pad_id) "
    "-> (Tensor, Tensor)",
    since="DRAFTED",
):
    """The next token of each of M branches of each row [B * M, 1], and which have ended [B * M]."""

    logits: fx.Node  # [B * M, q, V], a row's branches side by side
    ended: fx.Node  # [B * M] bool
    futures: int
    vocab: int
    eos_ids: list[int]
    pad_id: int

    @staticmethod
    def fake(logits, ended, *rest):
        return ended.new_empty(ended.shape[0], 1, dtype=torch.int64), torch.empty_like(ended)


class PromptLookup(Operator, schema="prompt_lookup(Tensor ids, Tensor lengths, int length) -> Tensor", since="DRAFTED"):
    """[B, L]: what followed the last tokens of each row where they stood in it before."""

    ids: fx.Node  # [B, S] packed
    lengths: fx.Node  # [B]
    length: int

    @staticmethod
    def fake(ids, lengths, length):
        return ids.new_empty(ids.shape[0], length, dtype=torch.int64)
