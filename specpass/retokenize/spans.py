"""Which characters of a text each token spells.

A span [a, b) counts characters, in fractions where several tokens spell a character only together: byte-level
tokenizers split an emoji into up to four tokens, and a token may end in the middle of one. Such tokens share evenly
what they spell together, so that spans follow each other and cover the text, whatever the tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

Span = tuple[float, float]


def evenly(start: float, end: float, count: int) -> list[Span]:
    """[start, end) in `count` equal spans."""
    edges = [start + (end - start) * index / count for index in range(count + 1)]
    return list(itertools.pairwise(edges))


def spell(tokenizer: Any, ids: Iterable[int]) -> tuple[str, list[Span]]:
    """The text of token ids, special ones included, and each token's span.

    Tokens in front of which, or behind which, the text is no whole number of characters are taken together. Bytes at
    the end that are no character spell nothing.
    """
    stream, text, spans, open_ = DecodeStream(skip_special_tokens=False), "", [], 0
    for token in ids:
        open_ += 1
        piece = stream.step(tokenizer.backend_tokenizer, token)
        if piece is not None:
            spans += evenly(len(text), len(text) + len(piece), open_)
            text, open_ = text + piece, 0
    return text, spans + [(float(len(text)), float(len(text)))] * open_


def shared(offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """Spans of a tokenizer's own offsets, in which tokens of one character all have all of it."""
    spans: list[Span] = []
    group = 0  # tokens that hang together
    start = end = 0
    for first, last in offsets:
        if group and first < end:
            group, end = group + 1, max(end, last)
            continue
        spans += evenly(start, end, group) if group else []
        group, start, end = 1, first, last
    return spans + (evenly(start, end, group) if group else [])
