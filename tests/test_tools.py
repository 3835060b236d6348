"""The examples of docs/tools.md, as they stand there, on tiny models without a compiler."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_models import save_model
from pages import example, titled
from tiny import tiny

import specpass
from specpass import hub

ROOT = Path(__file__).parents[1]
PAGE = "tools.md"
METHOD = specpass.SpecKV(budget=24, window=8, lookahead=4)
TEXT = " ".join(f"w{index % 90}" for index in range(60))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pair and its tokenizer, compiled once for all examples."""
    target, tokenizer = hub.load(save_model(tmp_path_factory.mktemp("models") / "tiny"))
    model = specpass.compile(target, draft=tiny(layers=1, seed=1), method=METHOD, lowering="eager")
    return SimpleNamespace(model=model, tokenizer=tokenizer, text=TEXT, specpass=specpass)


def prompts(report: Any) -> int:
    return sum(graph.kind == "prefill" for graph in report.graphs)


def test_pipelines_answer_chats_from_pruned_caches(models: Any) -> None:
    names = dict(vars(models))
    exec(example(PAGE, "Pipelines and chat"), names)
    assert [message["role"] for message in names["messages"]] == ["user", "assistant"] * 2
    report = specpass.report(models.model)
    assert prompts(report) == 1
    assert not report.refusals


def test_a_streamer_in_a_thread_gets_what_generate_returns(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example(PAGE, "Streamers"), dict(vars(models)))
    streamed = capsys.readouterr().out
    inputs = models.tokenizer(TEXT, return_tensors="pt")
    out = models.model.generate(**inputs, max_new_tokens=64)
    assert streamed == models.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_an_adapted_model_and_a_merged_one_answer_alike(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(specpass, "compile", functools.partial(specpass.compile, lowering="eager"))
    names = {**vars(models), "target": tiny(), "draft": tiny(layers=1, seed=1), "method": METHOD}
    names["inputs"] = models.tokenizer(TEXT, return_tensors="pt")
    exec(example(PAGE, "PEFT"), names)
    merged = names["model"].generate(**names["inputs"], max_new_tokens=64)
    assert merged.tolist() == names["out"].tolist()
    assert not specpass.report(names["model"]).refusals


MYPY = """[mypy]
strict = True
mypy_path = {root}
[mypy-specpass.*]
follow_imports = silent
[mypy-torch.*,transformers.*,sympy.*,numpy.*,rich.*,gguf.*]
follow_imports = skip
"""
WRONG = """
specpass.SpecKV(budget=[1])
specpass.SnapKV(bugdet=3)
specpass.SnapKW
"""


@pytest.fixture
def project(tmp_path: Path) -> SimpleNamespace:
    """A project that reads specpass as installed: what is right, and below it three mistakes, from line `wrong` on."""
    assert (ROOT / "specpass" / "py.typed").exists()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "specpass").symlink_to(ROOT / "specpass")
    (source,) = titled(PAGE, "Type checkers").values()
    (tmp_path / "consumer.py").write_text(source + WRONG)
    return SimpleNamespace(folder=tmp_path, site=tmp_path / "site", wrong=source.count("\n") + 2)


def said(project: SimpleNamespace, *command: str) -> str:
    line = [sys.executable, "-m", *command, "consumer.py"]
    return subprocess.run(line, cwd=project.folder, capture_output=True, text=True, check=False).stdout


def test_mypy_finds_mistakes_and_nothing_else(project: SimpleNamespace) -> None:
    (project.folder / "mypy.ini").write_text(MYPY.format(root=project.site))
    found = said(project, "mypy", "--no-color-output", "--no-error-summary")
    lines, first = found.splitlines(), project.wrong
    assert [line.split(":")[1] for line in lines] == [str(first), str(first + 1), str(first + 2)], found
    assert [line.rsplit("[", 1)[1] for line in lines] == ["arg-type]", "call-arg]", "attr-defined]"]


def test_pyright_finds_mistakes_and_nothing_else(project: SimpleNamespace) -> None:
    settings = {"extraPaths": ["site"], "typeCheckingMode": "strict"}
    (project.folder / "pyrightconfig.json").write_text(json.dumps(settings))
    found = said(project, "pyright", "--outputjson", "--pythonpath", sys.executable)
    errors = {error["range"]["start"]["line"] + 1: error["rule"] for error in json.loads(found)["generalDiagnostics"]}
    kinds = ["reportArgumentType", "reportCallIssue", "reportAttributeAccessIssue"]
    assert errors == dict(enumerate(kinds, project.wrong)), found
