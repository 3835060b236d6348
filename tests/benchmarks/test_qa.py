"""RULER's tasks about data sets: what is asked among which documents, and what is said where a file is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from qa_files import PARAGRAPHS, SUBJECTS, hotpotqa, squad, write_data_sets

from specpass.benchmarks.quality.run import Grid
from specpass.benchmarks.tasks import qa, scoring
from specpass.benchmarks.tasks.table import TASKS, check_task
from specpass.errors import BenchmarkError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path))
    return tmp_path


def documents(text: str) -> list[str]:
    numbered = re.findall(r"Document (\d+):\n(.*?)\n\n", text, re.DOTALL)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [document for _, document in numbered]


@pytest.mark.parametrize(("source", "own"), [(qa.SQUAD, 1), (qa.HOTPOTQA, 10)])
@pytest.mark.parametrize("seed", range(4))
def test_a_longer_prompt_has_more_documents_in_the_same_order(
    cache: Path, source: qa.Source, own: int, seed: int
) -> None:
    write_data_sets(cache)
    write = qa.question_of_documents(Random(seed), source)
    before: list[str] = []
    for count in (1, 2, 7, 30, SUBJECTS * PARAGRAPHS - own + 1):
        question = write(count)
        assert question is not None
        found = documents(question.user)
        assert len(found) == len(set(found)) == own + count - 1
        assert sum(question.expected[0] in document for document in found) == 1
        assert [document for document in found if document in before] == before
        before = found
    assert write(SUBJECTS * PARAGRAPHS - own + 2) is None


def test_paragraphs_of_the_same_article_come_first(cache: Path) -> None:
    write_data_sets(cache)
    write = qa.question_of_documents(Random(0), qa.SQUAD)
    question = write(PARAGRAPHS)
    assert question is not None
    subject = question.expected[0].split("-")[1]
    assert all(f"of subject {subject} is" in document for document in documents(question.user))
    more = write(PARAGRAPHS + 1)
    assert more is not None
    assert sum(f"of subject {subject} is" in document for document in documents(more.user)) == PARAGRAPHS


def test_only_questions_with_an_answer_are_asked_and_any_of_their_answers_counts(cache: Path) -> None:
    write_data_sets(cache)
    asked = qa.SQUAD.questions()
    assert len(asked) == SUBJECTS * PARAGRAPHS
    assert all(each.answers == (each.answers[0],) for each in asked)
    assert scoring.any_contained("It is the RED one.", ("green", "red")) == 1.0
    assert scoring.any_contained("It is the blue one.", ("green", "red")) == 0.0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qa_1", None),
        ("qa_2", None),
        ("qa_1", "{"),
        ("qa_1", "[]"),
        ("qa_1", json.dumps({"data": []})),
        ("qa_1", json.dumps(hotpotqa())),
        ("qa_2", json.dumps(squad())),
        ("qa_2", json.dumps([{"question": "what", "answer": "that", "context": {"title": ["a", "b"]}}])),
    ],
)
def test_a_file_that_is_not_there_or_another_one_says_where_it_comes_from(
    cache: Path, name: str, content: str | None
) -> None:
    source = TASKS[name].source
    assert source is not None
    if content is not None:
        source.path.parent.mkdir()
        source.path.write_text(content)
    for asks in (lambda: check_task(name), lambda: Grid(tasks=(name,)), lambda: TASKS[name].prompt(0, 900, None)):
        with pytest.raises(BenchmarkError) as error:
            asks()
        assert str(source.path) in str(error.value)
        assert source.url in str(error.value)


def test_what_asks_about_no_data_set_needs_none(cache: Path) -> None:
    assert not {"qa_1", "qa_2"} & set(Grid().tasks)
