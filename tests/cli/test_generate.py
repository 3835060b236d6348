"""`specpass generate` in process, on tiny models saved to folders: text, JSON, prompts, exit codes."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from announced import SNAP, announce
from cli_models import save_model
from gguf_files import write_gguf
from recorder import Recorder
from typer.testing import CliRunner

import specpass
from specpass import cli
from specpass.observe.progress import watching
from specpass.observe.streaming import Streamer

runner = CliRunner()
TEXT = " ".join(f"w{index % 90}" for index in range(60))
EAGER = ["--lowering", "eager", "--dtype", "float32", "-n", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def generate(folder: Path, *args: str, **kwargs: Any) -> Any:
    return runner.invoke(cli.app, ["generate", "-t", str(folder), *EAGER, *args], **kwargs)


def test_json_says_what_happened(folder: Path) -> None:
    result = generate(folder, "-m", "snapkv", "-b", "24", "--window", "8", "-p", TEXT, "--raw", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["method"] == specpass.SnapKV(budget=24, window=8).key
    assert answer["prompt_tokens"] == 60
    assert len(answer["token_ids"]) == answer["new_tokens"] == 6
    assert answer["stopped"] == "length"
    assert answer["refusals"] == []
    slots = 24 + 64
    assert answer["kv_bytes"] >= 2 * 2 * 2 * slots * 16 * 4  # layers, K and V, heads, slots, D, float32


def test_a_pair_of_gguf_files_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path / "cache"))
    target, draft = write_gguf(tmp_path / "target.gguf"), write_gguf(tmp_path / "draft.gguf", layers=1, seed=1)
    method = ["-b", "24", "--window", "8", "--lookahead", "4"]
    result = generate(target, "-d", str(draft), *method, "-p", "Why is the sky blue, and not green?", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["target"], answer["draft"], answer["refusals"]) == (str(target), str(draft), [])
    assert answer["new_tokens"] == len(answer["token_ids"]) > 0


def test_a_pruned_answer_is_the_librarys(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = generate(
        folder, "-d", str(folder), "-b", "24", "--window", "8", "--lookahead", "4", "-p", TEXT, "--raw", "--json"
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    specpass.compile(model, draft=model, method=specpass.SpecKV(24, window=8, lookahead=4), lowering="eager")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert json.loads(result.stdout)["token_ids"] == out[0, 60:].tolist()


@pytest.mark.parametrize("kind", ["ngram", "self"])
def test_a_lookahead_without_a_draft(folder: Path, kind: str) -> None:
    result = generate(folder, "-b", "24", "--window", "8", "--lookahead", kind, "-p", TEXT, "--raw", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["method"] == specpass.SpecKV(budget=24, window=8, lookahead=kind).key
    assert answer["refusals"] == []


def test_a_draft_with_another_tokenizer_reads_the_text(folder: Path, tmp_path: Path) -> None:
    """Half the words are unknown to the draft."""
    draft = save_model(tmp_path / "draft", words=60, layers=1, seed=1)
    method = ("-b", "24", "--window", "8", "--lookahead", "4")
    result = generate(folder, "-d", str(draft), *method, "-p", TEXT, "--raw", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["draft"], answer["refusals"], answer["new_tokens"]) == (str(draft), [], 6)
    assert "another tokenizer" in result.stderr


@pytest.mark.parametrize(("dtype", "noted"), [("bfloat16", True), ("float32", False)])
def test_a_dtype_without_instructions_is_noted(
    dtype: str, noted: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specpass.kernels.cpu.isa.multiplies", lambda asked: asked == torch.float32)
    options = ("-m", "full", "--dtype", dtype, "-p", TEXT, "--raw")
    result = generate(folder, *options)
    assert result.exit_code == 0, result.output
    assert ("no instructions for bfloat16" in result.stderr) is noted
    assert ("--dtype float32" in result.stderr) is noted


def test_a_pruned_answer_needs_no_instructions_for_its_dtype(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled multiplies in float32: no note, and the report says so."""
    monkeypatch.setattr("specpass.kernels.cpu.isa.multiplies", lambda asked: asked == torch.float32)
    monkeypatch.setattr("specpass.kernels.cpu.wide.multiplies", lambda asked: asked == torch.float32)
    method = ("-m", "snapkv", "-b", "24", "--window", "8", "--dtype", "bfloat16", "--lowering", "eager")
    result = generate(folder, *method, "-p", TEXT, "--raw", "--json")
    assert result.exit_code == 0, result.output
    assert "no instructions for bfloat16" not in result.stderr


def test_text_of_the_answer_alone_goes_to_stdout(folder: Path) -> None:
    common = ("-m", "full", "-p", TEXT, "--raw")
    text = generate(folder, *common)
    answer = json.loads(generate(folder, *common, "--json").stdout)
    assert text.exit_code == 0
    assert text.stdout == answer["text"] + "\n"
    assert answer["text"].strip()


def test_prompt_by_file_and_by_stdin_are_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(TEXT)
    common = ("-m", "full", "--raw", "--json")
    by_file = json.loads(generate(folder, *common, "-f", str(tmp_path / "prompt.txt")).stdout)
    by_stdin = json.loads(generate(folder, *common, input=TEXT).stdout)
    assert by_file["token_ids"] == by_stdin["token_ids"]


def test_the_chat_template_is_on_unless_raw(folder: Path) -> None:
    common = ("-m", "full", "--json", "-p", TEXT)
    with_template = json.loads(generate(folder, *common).stdout)
    raw = json.loads(generate(folder, *common, "--raw").stdout)
    assert (with_template["prompt_tokens"], raw["prompt_tokens"]) == (62, 60)


def test_sampling_follows_its_seed(folder: Path) -> None:
    common = ("-m", "full", "-p", TEXT, "--raw", "--json", "--temperature", "3.0", "--seed")
    first, again, other = (json.loads(generate(folder, *common, seed).stdout)["token_ids"] for seed in "112")
    assert first == again
    assert first != other


def test_several_answers_of_one_prompt(folder: Path) -> None:
    common = ("-m", "snapkv", "-b", "24", "--window", "8", "-p", TEXT, "--raw", "--answers", "3")
    dice = ("--temperature", "3.0")
    answer = json.loads(generate(folder, *common, *dice, "--json").stdout)
    ids = [own["token_ids"] for own in answer["answers"]]
    assert len({tuple(own) for own in ids}) == 3
    assert (answer["token_ids"], answer["new_tokens"]) == (ids[0], 6)
    assert answer["kv_bytes"] < 3 * 2 * 2 * 2 * (24 + 64) * 16 * 4  # of three copies
    text = generate(folder, *common, *dice).stdout
    assert text == "".join(f"[{n}] {own['text']}\n" for n, own in enumerate(answer["answers"], 1))
    for more, why in (((), "add --temperature"), ((*dice, "--then", "w7"), "leave --then out")):
        result = generate(folder, *common, *more)
        assert result.exit_code == 2
        assert why in " ".join(result.stderr.replace("│", " ").split())


def test_ctrl_c_keeps_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Streamer.put

    def interrupt(self: Streamer, value: torch.Tensor) -> None:
        put(self, value)
        if len(self.ids) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Streamer, "put", interrupt)
    whole = json.loads(generate(folder, "-m", "full", "-p", TEXT, "--raw", "--json").stdout)
    text = generate(folder, "-m", "full", "-p", TEXT, "--raw")
    assert whole["stopped"] == "interrupt"
    assert whole["new_tokens"] == 3
    assert text.exit_code == 130
    assert text.stdout == whole["text"] + "\n"


def test_ctrl_c_while_loading_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specpass.hub.load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    result = generate(folder, "-m", "full", "-p", TEXT)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_a_real_sigint_ends_with_130_and_no_traceback(folder: Path) -> None:
    line = [sys.executable, "-m", "specpass.cli", "generate", "-t", str(folder), "-m", "full", "--raw", "-n", "4000"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with subprocess.Popen(
        [*line, "-p", TEXT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(2)  # the first word has come
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert first.strip()
    assert rest.endswith("\n")
    assert "Traceback" not in errors


def test_what_takes_long_is_told_until_the_answer_begins_and_not_when_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder()
    monkeypatch.setattr("specpass.cli.options.progress", lambda: watching(seen))
    line = ("-m", "snapkv", "-b", "24", "--window", "8", "-p", TEXT, "--raw")
    assert generate(folder, *line).exit_code == 0
    assert [task.path[0] for task in seen.tasks][:3] == ["loading tiny", "compiling", "reading the prompt"]
    assert all(task.over for task in seen.tasks)
    seen.tasks.clear()
    assert generate(folder, "-m", "full", "-p", TEXT, "--raw").exit_code == 0
    assert [(task.path, task.total, task.done) for task in seen.tasks[1:]] == [(("reading the prompt",), 2, 2)]
    seen.tasks.clear()
    assert generate(folder, *line, "--quiet").exit_code == 0
    assert not seen.tasks


def test_a_method_of_ones_own_has_a_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "generate_method", SNAP, ["toy = generate_method:Toy"])
    common = ("-b", "24", "--window", "8", "-p", TEXT, "--raw", "--json")
    own = json.loads(generate(folder, "-m", "toy", "-o", "factor=3", *common).stdout)
    assert own["method"].startswith("generate_method.Toy(budget=24, window=8, ")
    assert own["method"].endswith("factor=3)")
    assert own["token_ids"] == json.loads(generate(folder, "-m", "snapkv", *common).stdout)["token_ids"]
    wrong = generate(folder, "-m", "toyy", *common)
    assert wrong.exit_code == 1
    assert "streamingllm, toy, full" in wrong.stderr


def commands() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(command: Any, path: str) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                walk(child, f"{path} {name}".strip())
        else:
            found[path] = command

    walk(typer.main.get_command(cli.app), "")
    return found


@pytest.mark.parametrize("path", sorted(commands()))
def test_help_ends_with_a_line_that_parses(path: str) -> None:
    result = runner.invoke(cli.app, [*path.split(), "--help"], env={"COLUMNS": "100"})
    line = result.stdout.strip().splitlines()[-1].strip()
    assert line.startswith(f"Example: specpass {path}"), line
    words = shlex.split(line.removeprefix("Example: specpass "))[len(path.split()) :]
    commands()[path].make_context(path, words)  # raises on anything that the command does not take


@pytest.mark.real
def test_the_example_of_the_help_works_as_it_stands() -> None:
    help_text = runner.invoke(cli.app, ["generate", "--help"], env={"COLUMNS": "100"}).stdout
    line = help_text.strip().splitlines()[-1].strip().removeprefix("Example: specpass ")
    done = subprocess.run(
        [sys.executable, "-m", "specpass.cli", *shlex.split(line), "-n", "24"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "light" in done.stdout.lower() or "sky" in done.stdout.lower()
