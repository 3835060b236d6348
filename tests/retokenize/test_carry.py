"""Scores go from one tokenizer's tokens to another's by the characters that they spell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of import words

from specpass.retokenize import TokenizerPair, paired
from specpass.retokenize.pair import encode, front, inside
from specpass.retokenize.spans import Span, shared, spell

CORPUS = "the cat sat on the mat; naïve café 日本語 日本 😀😀 end of the cat. " * 4
COARSE, FINE = words(CORPUS, 380), words("then that there 日本 mats", 265)
BOS = words(CORPUS, 300, front=True)
TOKENIZERS = (COARSE, FINE, BOS)
# What no normaliser joins, and not the sign that stands for broken bytes.
TEXTS = st.text(
    st.one_of(st.sampled_from("the cat\n.日本😀👩\u200d👧ï"), st.characters(exclude_categories=("Cs",))), max_size=30
).filter(lambda text: "\ufffd" not in text)
PLAIN = TEXTS.map(lambda text: COARSE.backend_tokenizer.normalizer.normalize_str(text))


def naive(scores: list[float], ours: list[Span], theirs: list[Span]) -> list[float]:
    """Every token against every other."""
    return [
        max((s for s, (c, d) in zip(scores, theirs, strict=True) if min(b, d) - max(a, c) > 1e-6), default=0.0)
        for a, b in ours
    ]


@settings(deadline=None, max_examples=25)
@given(PLAIN, st.sampled_from(TOKENIZERS))
def test_spans_follow_each_other_and_cover_the_text(text: str, tokenizer: Any) -> None:
    ids = encode(tokenizer, text)["input_ids"]
    spelled, spans = spell(tokenizer, ids)
    assert spelled == text
    assert len(spans) == len(ids)
    edges = [0.0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == pytest.approx(edges[:-1])
    assert edges[-1] == pytest.approx(len(text))
    assert all(start < end for start, end in spans)


@settings(deadline=None, max_examples=25)
@given(PLAIN, st.sampled_from(TOKENIZERS))
def test_a_tokenizers_own_offsets_say_the_same(text: str, tokenizer: Any) -> None:
    made = encode(tokenizer, text)
    assert shared(made["offset_mapping"]) == spell(tokenizer, made["input_ids"])[1]


@settings(deadline=None, max_examples=25)
@given(PLAIN, st.sampled_from(TOKENIZERS))
def test_one_tokenizer_keeps_every_score(text: str, tokenizer: Any) -> None:
    ids = encode(tokenizer, text, add_special_tokens=True)["input_ids"]
    reading = TokenizerPair(tokenizer, tokenizer).read(ids)
    assert reading.ids == ids
    scores = torch.rand(len(ids))
    assert torch.equal(reading.pairs.carry(scores), scores)


@settings(deadline=None, max_examples=25)
@given(PLAIN, st.permutations(TOKENIZERS), st.randoms())
def test_scores_are_the_highest_of_what_overlaps(text: str, pair: Any, chance: Any) -> None:
    ours, theirs = pair[:2]
    first = len(front(ours))
    ids = encode(ours, text, add_special_tokens=True)["input_ids"]
    reading = TokenizerPair(ours, theirs).read(ids)
    made = encode(theirs, text, add_special_tokens=True)
    assert reading.ids == made["input_ids"]
    leading = inside(made["special_tokens_mask"])[0]
    scores = [chance.random() for _ in reading.ids]
    carried = reading.pairs.carry(torch.tensor(scores, dtype=torch.float64)).tolist()
    due = naive(scores[leading:], spell(ours, ids[first:])[1], shared(made["offset_mapping"][leading:]))
    if due:
        behind = (
            due[0] if not leading else max(scores[0], due[0])
        )  # BOS counts for the first token, where ours has none
        assert carried[first:] == pytest.approx([due[0] if first else behind, *due[1:]])
        assert max(carried) == max(scores), "no score is lost"
        assert carried[0] == (scores[0] if first and leading else due[0] if first else behind)


def test_added_tokens_are_read_as_what_they_are() -> None:
    text = "<|end|>the cat<|end|>"
    ids = COARSE(text)["input_ids"]
    reading = TokenizerPair(COARSE, FINE).read(ids)
    assert ids[0] == ids[-1] == 1
    assert reading.ids[0] == reading.ids[-1] == 1
    spread = torch.zeros(len(reading.ids))
    spread[-1] = 1.0
    assert reading.pairs.carry(spread).nonzero().flatten().tolist() == [len(ids) - 1]


def test_ids_that_no_text_is_read_as() -> None:
    """Half a character at the end, and single letters of a word that has a token: spans come from the ids."""
    emoji = COARSE("😀")["input_ids"] if len(COARSE("😀")["input_ids"]) > 1 else FINE("😀")["input_ids"]
    ids = [*FINE("th")["input_ids"], *FINE("e")["input_ids"], *emoji[:-1]]
    reading = TokenizerPair(FINE, COARSE).read(ids)
    assert reading.tail.startswith("the")
    assert COARSE.decode(reading.ids) == "the"
    assert reading.pairs.count == len(ids)


@settings(deadline=None, max_examples=25)
@given(PLAIN, PLAIN.filter(bool), st.permutations(TOKENIZERS))
def test_a_continuation_comes_back_as_its_text(before: str, after: str, pair: Any) -> None:
    ours, theirs = pair[:2]
    both = TokenizerPair(ours, theirs)
    reading = both.read(encode(ours, before, add_special_tokens=True)["input_ids"])
    found = both.ahead(reading, encode(theirs, after)["input_ids"])
    assert spell(ours, found)[0] == COARSE.backend_tokenizer.normalizer.normalize_str(after)


def test_a_text_that_stops_inside_a_character() -> None:
    both = TokenizerPair(COARSE, FINE)
    reading = both.read(COARSE("the ")["input_ids"])
    written = FINE("cat 👩")["input_ids"]
    assert COARSE.decode(both.ahead(reading, written[:-1])) == "cat "


def test_tokens_without_characters() -> None:
    """What spells nothing goes with what stands behind it; BOS on both sides goes with BOS."""
    scores = torch.tensor([3.0, 1.0, 2.0])
    spans: list[Span] = [(0.0, 0.0), (0.0, 2.0), (2.0, 3.0)]
    assert paired(spans, spans, 1, 1).carry(scores).tolist() == [3.0, 1.0, 2.0]
    assert paired(spans, spans[1:], 1, 0).carry(scores[1:]).tolist() == [1.0, 1.0, 2.0]
    assert paired(spans[1:], spans, 0, 1).carry(scores).tolist() == [3.0, 2.0]
    assert paired([*spans[1:], (3.0, 3.0)], spans[1:]).carry(scores[1:]).tolist() == [1.0, 2.0, 0.0]
