"""The tasks by name. A prompt is a function of task, seed, length and tokenizer, and of the Python release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from specpass.benchmarks.tasks import code as code_tasks
from specpass.benchmarks.tasks import qa, ruler, scoring
from specpass.benchmarks.tasks.prompts import Prompt, Question, fit
from specpass.errors import BenchmarkError

Writer = Callable[[int], Question | None]


@dataclass(frozen=True)
class Task:
    """How prompts are written and answers scored; `new_tokens` is room for the whole answer.

    `source` is a data set that it asks about, which must have been put into its place.
    """

    name: str
    writer: Callable[[Random, int], Writer]
    new_tokens: int
    score: Callable[[str, Sequence[str]], float] = scoring.contained
    source: qa.Source | None = None

    def prompt(self, seed: int, length: int, tokenizer: Any) -> Prompt:
        """The longest prompt of at most `length` tokens. Raises: BenchmarkError: no prompt of this length."""
        write = self.writer(Random(f"{self.name}-{seed}"), length)
        return fit(self.name, seed, length, tokenizer, write)

    def scored(self, prompt: Prompt, tokens: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """What a result file says of an answer's tokens, which `verify` reads again."""
        answer = tokenizer.decode(tokens, skip_special_tokens=True)
        return {
            "digest": prompt.digest,
            "expected": list(prompt.expected),
            "answer": answer,
            "score": self.score(answer, prompt.expected),
            "tokens": tokens,
        }


def _plain(make: Callable[..., Writer], **options: Any) -> Callable[[Random, int], Writer]:
    """A writer that does not depend on the length."""
    return lambda rng, length: make(rng, **options)


def _asked(name: str, source: qa.Source) -> Task:
    return Task(name, _plain(qa.question_of_documents, source=source), 32, scoring.any_contained, source)


_UUIDS: dict[str, Any] = {"keys": ruler.uuid_text, "values": ruler.uuid_text, "kind": "uuids"}

# Those that tell methods apart come first: each answer is longer than a token, and the question does not look like it.
TASKS = {
    task.name: task
    for task in (
        Task("niah_multikey_2", _plain(ruler.niah, hay="needles"), 16),
        Task("code_retrieval", _plain(code_tasks.code_retrieval), 16),
        Task("niah_multivalue", _plain(ruler.niah, hay="prose", per_key=ruler.VALUES), 56),
        Task("vt", _plain(ruler.variable_tracking), 40),
        Task("niah_multiquery", _plain(ruler.niah, hay="prose", needles=ruler.QUERIES, asked=ruler.QUERIES), 56),
        Task("niah_multikey_3", _plain(ruler.niah, hay="needles", **_UUIDS), 48),
        Task("code_completion", _plain(code_tasks.code_completion), 32, scoring.edit_similarity),
        Task("niah_multikey_1", _plain(ruler.niah, hay="prose", needles=ruler.QUERIES), 16),
        Task("niah_single_1", _plain(ruler.niah, hay="noise"), 16),
        Task("niah_single_2", _plain(ruler.niah, hay="prose"), 16),
        Task("niah_single_3", _plain(ruler.niah, hay="prose", values=ruler.uuid_text, kind="uuids"), 48),
        Task("cwe", ruler.common_words, 56),
        Task("fwe", _plain(ruler.frequent_words), 40),
        _asked("qa_1", qa.SQUAD),
        _asked("qa_2", qa.HOTPOTQA),
    )
}
SEPARATING = tuple(TASKS)[:4]
WITHOUT_DATA = tuple(name for name, task in TASKS.items() if task.source is None)


def check_task(name: str) -> None:
    """Raises: BenchmarkError: there is no such task, or not the data set that it asks about."""
    if name not in TASKS:
        raise BenchmarkError(f"{name!r} is not a task. Known: {', '.join(TASKS)}.")
    source = TASKS[name].source
    if source is not None:
        source.questions()
