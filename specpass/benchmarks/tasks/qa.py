"""RULER's two tasks (arXiv 2404.06654) that ask about data sets: SQuAD's paragraphs, HotpotQA's.

No Python package brings the data: each file is what its authors publish, in the user's cache folder.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from specpass.benchmarks.tasks.prompts import Question
from specpass.errors import BenchmarkError
from specpass.files import datasets_dir

ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Asked:
    """A question, each of the answers that count, the documents it is asked about, and those on the same subject."""

    query: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A data set: `read` makes questions of its file's JSON."""

    name: str
    file: str
    url: str
    read: Callable[[Any], list[Asked]]

    @property
    def path(self) -> Path:
        return datasets_dir() / self.file

    def questions(self) -> tuple[Asked, ...]:
        """Raises: BenchmarkError: the file is not there, or another one."""
        if not self.path.is_file():
            raise BenchmarkError(
                f"{self.path} is not there, and no package brings {self.name}: save {self.url} as this file, or leave "
                "the task out."
            )
        return _parsed(self, self.path)


@functools.cache
def _parsed(source: Source, path: Path) -> tuple[Asked, ...]:
    try:
        found = tuple(source.read(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchmarkError(
            f"{path} is no file of {source.name} ({type(error).__name__}: {error}): save {source.url} as this file."
        ) from error
    if not found:
        raise BenchmarkError(f"{path} holds no question that has an answer: save {source.url} as this file.")
    return found


def _squad(data: Any) -> list[Asked]:
    """Those that have an answer, with the other paragraphs of their article."""
    found = []
    for article in data["data"]:
        paragraphs = tuple(dict.fromkeys(part["context"] for part in article["paragraphs"]))
        for part in article["paragraphs"]:
            own = part["context"]
            near = tuple(paragraph for paragraph in paragraphs if paragraph != own)
            for each in part["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in each["answers"]))
                if answers and not each.get("is_impossible"):
                    found.append(Asked(each["question"], answers, (own,), near))
    return found


def _hotpotqa(data: Any) -> list[Asked]:
    """Each with its ten paragraphs, of which two hold the answer."""
    found = []
    for each in data:
        own = dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in each["context"])
        found.append(Asked(each["question"], (each["answer"],), tuple(own)))
    return found


SQUAD = Source("SQuAD", "squad.json", "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json", _squad)
HOTPOTQA = Source(
    "HotpotQA", "hotpotqa.json", "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json", _hotpotqa
)


def question_of_documents(rng: Random, source: Source) -> Callable[[int], Question | None]:
    """A question among documents: its own, then those on the same subject, then any, in an order of chance.

    Raises: BenchmarkError: the data set is not there.
    """
    questions = source.questions()
    asked = rng.choice(questions)
    every = dict.fromkeys(document for each in questions for document in each.own)
    rest = sorted(every.keys() - {*asked.own, *asked.near})
    others = rng.sample(asked.near, len(asked.near)) + rng.sample(rest, len(rest))
    place = {document: rng.random() for document in (*asked.own, *others)}

    def write(count: int) -> Question | None:
        if count > len(others) + 1:
            return None
        documents = sorted((*asked.own, *others[: count - 1]), key=place.__getitem__)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
        given = f"{ASK}\n\nThe following are given documents.\n\n{context}\n\n"
        return Question(given, f"{ASK}\n\nQuestion: {asked.query}", "Answer:", asked.answers)

    return write
