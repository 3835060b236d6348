"""Small data sets in the form of SQuAD's and HotpotQA's files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from specpass.benchmarks.tasks import haystack

SUBJECTS, PARAGRAPHS, WORDS = 6, 20, 40


def _paragraph(rng: Random, fact: str) -> str:
    """WORDS words with a fact in the middle."""
    words = rng.sample(haystack.words(), WORDS)
    return " ".join([*words[: WORDS // 2], fact, *words[WORDS // 2 :]])


def squad() -> dict[str, Any]:
    """An article a subject; every other question has no answer, as in SQuAD 2.0."""
    rng = Random(0)
    articles = []
    for subject in range(SUBJECTS):
        paragraphs = []
        for number in range(PARAGRAPHS):
            answer = f"squad-{subject}-{number}"
            answered = {"question": f"What is fact {number} of subject {subject}?", "is_impossible": False}
            answered |= {"answers": [{"text": answer, "answer_start": 0}, {"text": answer, "answer_start": 0}]}
            unanswered = {"question": "What is not said?", "answers": [], "is_impossible": True}
            text = _paragraph(rng, f"Fact {number} of subject {subject} is {answer}.")
            paragraphs.append({"context": text, "qas": [answered, unanswered]})
        articles.append({"title": f"subject {subject}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpotqa() -> list[dict[str, Any]]:
    """Ten paragraphs a question."""
    rng, found = Random(1), []
    for number in range(2 * SUBJECTS):
        facts = [f"Link {number} is {number}-{part}." for part in range(10)]
        facts[3] = f"Link {number} ends at hotpot-{number}."
        context = [[f"Title {number} {part}", [_paragraph(rng, fact)]] for part, fact in enumerate(facts)]
        found.append({"question": f"Where does link {number} end?", "answer": f"hotpot-{number}", "context": context})
    return found


def write_data_sets(cache: Path) -> None:
    """Where specpass looks for them in its cache folder."""
    folder = cache / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("squad.json", squad()), ("hotpotqa.json", hotpotqa())):
        (folder / name).write_text(json.dumps(data))
