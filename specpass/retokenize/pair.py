"""A target's tokenizer and a draft's, and what each makes of the other's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from specpass.errors import TokenizerMismatchError
from specpass.retokenize.carry import Pairs, paired
from specpass.retokenize.spans import shared, spell

TAIL = 16  # tokens in front of a text by which a tokenizer sees how it begins (a space, a word that goes on)
BROKEN = "\ufffd"  # what bytes that are no character decode to


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt as the draft reads it.

    Args:
        ids: of the draft. pairs: which of its tokens overlap with the target's.
        tail: the end of the prompt's text.
    """

    ids: list[int]
    pairs: Pairs
    tail: str


@dataclasses.dataclass(frozen=True)
class TokenizerPair:
    """Two fast tokenizers of transformers.

    Special tokens are spelled as text, and are special to the draft where its tokenizer knows them; what the target's
    puts in front of every text (BOS) becomes what the draft's puts there.

    Raises: TokenizerMismatchError: a tokenizer is no fast one.
    """

    target: Any
    draft: Any

    def __post_init__(self) -> None:
        for name, tokenizer in (("target's", self.target), ("draft's", self.draft)):
            if not hasattr(tokenizer, "backend_tokenizer"):
                raise TokenizerMismatchError(
                    f"the {name} tokenizer is a {type(tokenizer).__name__}: a prompt's text is carried from one "
                    "tokenizer to another by fast tokenizers, such as AutoTokenizer.from_pretrained(folder) gives; "
                    "pass tokenizers=(the target's, the draft's)."
                )

    def read(self, ids: Sequence[int]) -> Reading:
        """What the draft reads of a prompt of the target's ids, without padding."""
        ours = front(self.target)
        leading = len(ours) if list(ids[: len(ours)]) == ours else 0
        text, spans = spell(self.target, ids[leading:])
        theirs = encode(self.draft, text, add_special_tokens=True)
        first, last = inside(theirs["special_tokens_mask"])
        offsets = shared(theirs["offset_mapping"][first:last])
        pairs = paired([(0.0, 0.0)] * leading + spans, [(0.0, 0.0)] * first + offsets, leading, first)
        tail = spell(self.target, ids[-TAIL:])[0]
        return Reading(theirs["input_ids"][:last], pairs, tail)

    def ahead(self, reading: Reading, written: Sequence[int]) -> list[int]:
        """The target's ids of the draft's tokens behind a prompt; bytes at the end that are no character are left."""
        before = list(reading.ids[-TAIL:])
        start = len(spell(self.draft, before)[0])
        text = spell(self.draft, [*before, *written])[0][start:].rstrip(BROKEN)
        both = encode(self.target, reading.tail + text)
        count = len(reading.tail)
        offsets = both["offset_mapping"]
        if any(first < count < last for first, last in offsets):  # the prompt's last token would be another
            return encode(self.target, text)["input_ids"]
        return [token for token, (first, _) in zip(both["input_ids"], offsets, strict=True) if first >= count]


def encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> Any:
    """Ids, offsets and the mask of special tokens that were added."""
    return tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )


def inside(mask: Sequence[int]) -> tuple[int, int]:
    """Where a text begins and ends between what a tokenizer put around it."""
    real = [index for index, added in enumerate(mask) if not added]
    return (real[0], real[-1] + 1) if real else (len(mask), len(mask))


def front(tokenizer: Any) -> list[int]:
    """What a tokenizer puts in front of every text."""
    made = encode(tokenizer, "a", add_special_tokens=True)
    return list(made["input_ids"][: inside(made["special_tokens_mask"])[0]])
