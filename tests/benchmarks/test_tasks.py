"""The benchmark's prompts and scores: functions of task, seed, length and tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
from cli_models import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from qa_files import write_data_sets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specpass.benchmarks.tasks import code as code_tasks
from specpass.benchmarks.tasks import haystack, scoring
from specpass.benchmarks.tasks.table import SEPARATING, TASKS, WITHOUT_DATA, check_task
from specpass.errors import BenchmarkError

RETRIEVAL = [name for name in TASKS if name != "code_completion"]
UNIT = 80  # most words of one unit of haystack (a sentence, a line of code)


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    return fast


WORDS = word_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cache")
    write_data_sets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECPASS_CACHE", str(folder))
        yield


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), length=st.integers(600, 3000))
def test_a_prompt_is_what_it_should_be(name: str, seed: int, length: int) -> None:
    task = TASKS[name]
    prompt = task.prompt(seed, length, WORDS)
    assert prompt == task.prompt(seed, length, WORDS)
    assert prompt.digest == task.prompt(seed, length, WORDS).digest
    assert length - UNIT <= len(prompt.ids) <= length
    assert task.score("\n".join(prompt.expected), prompt.expected) == 1.0
    assert task.score("", prompt.expected) == 0.0
    assert len(set(prompt.expected)) == len(prompt.expected)
    if name in RETRIEVAL:
        assert all(answer in prompt.text for answer in prompt.expected)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_another_seed_is_another_question_and_its_answer_scores_0(name: str) -> None:
    ours, other = (TASKS[name].prompt(seed, 900, WORDS) for seed in (1, 2))
    assert ours.digest != other.digest
    assert TASKS[name].score(" ".join(other.expected), ours.expected) < 0.2  # common words may be common to both


@pytest.mark.parametrize("name", TASKS)
def test_the_context_ends_where_the_question_begins(name: str) -> None:
    begins = {"niah": "What", "code_retrieval": "What", "code_completion": "# file:", "qa": "Answer the question"}
    for tokenizer in (WORDS, word_tokenizer(template=None)):
        prompt = TASKS[name].prompt(4, 900, tokenizer)
        asked = " ".join(prompt.text.split()[prompt.context :])
        assert asked.startswith(begins.get(name, begins.get(name.split("_")[0], "Question:")))
        assert prompt.context > 0.8 * len(prompt.ids) or name == "code_completion"
        assert prompt.seen == len(prompt.ids)
        assert dataclasses.replace(prompt, agnostic=True).seen == prompt.context


@pytest.mark.parametrize("name", SEPARATING)
def test_a_longer_prompt_asks_about_the_same_thing(name: str) -> None:
    short, long = (TASKS[name].prompt(3, length, WORDS) for length in (800, 1600))
    if name == "niah_multikey_2":  # whose question is about a line at the same depth
        assert len(short.expected) == len(long.expected)
    else:
        assert short.expected == long.expected


def test_the_question_alone_does_not_hold_the_answer() -> None:
    for name in filter(re.compile("niah").match, TASKS):
        prompt = TASKS[name].prompt(0, 700, WORDS)
        assert all(prompt.text.count(answer) == 1 for answer in prompt.expected), name


def test_variables_form_one_chain() -> None:
    prompt = TASKS["vt"].prompt(5, 800, WORDS)
    body = prompt.text.rpartition("Memorize and track")[2]
    links = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body))
    value = re.findall(r"assigned the value (\d+)", body)[-1]

    def resolve(name: str) -> str:
        return resolve(links[name]) if name in links else name

    assert {name for name in links if resolve(name) == value} == set(prompt.expected)


def test_word_counts_make_the_answer_right() -> None:
    common = TASKS["cwe"].prompt(0, 2000, WORDS)
    listed = re.findall(r"\d+\. (\w+)", common.text)
    assert set(sorted(set(listed), key=listed.count)[-10:]) == set(common.expected)
    frequent = TASKS["fwe"].prompt(0, 1500, WORDS)
    coded = re.findall(r"\b[a-z]{6}\b", frequent.text.partition("coded words. ")[2].partition("\nQuestion")[0])
    assert sorted(set(coded), key=coded.count)[-3:] == list(reversed(frequent.expected))


def test_a_number_in_the_source_is_the_seeds() -> None:
    prompt = TASKS["code_retrieval"].prompt(4, 1200, WORDS)
    (number,) = prompt.expected
    assert prompt.text.count(number) == 1
    assert not any(number in text for text in haystack.sources().values())
    assert len(code_tasks.facts()) > 50


def test_a_line_to_complete_uses_what_another_file_defines() -> None:
    for gap in code_tasks.gaps()[::97]:
        assert gap.block.file != gap.file
        assert haystack.package_of(gap.block.file) == haystack.package_of(gap.file)
        line = haystack.sources()[gap.file].splitlines()[gap.line]
        assert re.search(rf"\b{gap.name}\b", line)
        assert gap.name in gap.block.text
    prompt = TASKS["code_completion"].prompt(0, 1500, WORDS)
    assert prompt.expected[0] not in prompt.text.partition("# file: ")[0]


def test_without_a_chat_template_the_text_is_plain() -> None:
    prompt = TASKS["vt"].prompt(0, 800, word_tokenizer(template=None))
    assert prompt.text.startswith("Memorize")
    assert prompt.text.endswith("they are:")


@pytest.mark.parametrize(("length", "words"), [(20, ("too short", "vt")), (3_000_000, ("too little text", "cwe"))])
def test_a_length_that_cannot_be_is_refused(length: int, words: tuple[str, ...]) -> None:
    with pytest.raises(BenchmarkError) as error:
        TASKS[words[1]].prompt(0, length, WORDS)
    assert words[0] in str(error.value)


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(BenchmarkError, match="vt"):
        check_task("riddles")


def test_rulers_thirteen_tasks_are_all_there() -> None:
    assert len([name for name in TASKS if not name.startswith("code_")]) == 13
    assert set(TASKS) - set(WITHOUT_DATA) == {"qa_1", "qa_2"}


def test_contained_is_a_share_without_case() -> None:
    assert scoring.contained("It is ABC and 12.", ["abc", "12", "13", "x9"]) == 0.5


def test_edit_similarity_reads_the_first_line_of_code() -> None:
    assert scoring.edit_similarity("```python\n# so\nreturn value\nmore", ["return value"]) == 1.0
    assert scoring.edit_similarity("return values", ["return value"]) == 0.96  # 2 * 12 / 25, in hundredths
    assert scoring.edit_similarity("zzz", ["return value"]) == 0.0
