"""Small tokenizers of which every sequence of ids is what its text is read as, or which split characters."""

from __future__ import annotations

import itertools
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LETTERS = [chr(0x100 + index) for index in range(128)]  # one for each id of a tiny model


def letters() -> PreTrainedTokenizerFast:
    """Each of 128 letters is a token, in order."""
    return _fast(_pieces(LETTERS, []))


def pairs_of_letters(text: str, seed: int = 5) -> PreTrainedTokenizerFast:
    """The same letters in another order, and up to 100 of the pairs that stand in `text`."""
    order, pairs = list(LETTERS), list(dict.fromkeys(itertools.pairwise(text)))
    chance = random.Random(seed)
    chance.shuffle(order)
    chance.shuffle(pairs)
    return _fast(_pieces(order, pairs[:100]))


def words(corpus: str, size: int, *, front: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on `corpus`; one that puts <s> in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    specials = ["<s>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [corpus], trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet)
    )
    if front:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _fast(tokenizer)


def _pieces(singles: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate([*singles, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
