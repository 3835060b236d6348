"""The demo on tiny models: rows, what was kept, the picture and the page."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from announced import SNAP, announce
from cli_models import save_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

import specpass
from specpass import cli, hub
from specpass.demo import pictures
from specpass.demo import run as demo
from specpass.demo.prompt import EXPECTED, QUESTION, Prompt, build_prompt

BUDGET, TOKENS = 40, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[demo.Result], Path]:
    out = tmp_path_factory.mktemp("demo") / "pictures"
    name = str(folder)
    return demo.run(
        BUDGET, TOKENS, methods=demo.ALL_METHODS, target=name, draft=name, dtype="float32", lowering="eager", out=out
    ), out


def prompt_of(folder: Path) -> Prompt:
    return build_prompt(AutoTokenizer.from_pretrained(folder), TOKENS)


def test_the_prompt_marks_where_the_answer_stands(folder: Path) -> None:
    prompt = prompt_of(folder)
    assert TOKENS - 20 <= len(prompt) <= TOKENS
    assert EXPECTED in "".join(prompt.tokens[i] for i in prompt.answer)
    assert "".join(prompt.tokens).count(EXPECTED) == 1
    assert QUESTION in "".join(prompt.tokens)
    assert prompt.inputs["input_ids"].shape == (1, len(prompt))


def test_rows_are_full_kv_and_every_method_that_exists(ran: tuple[list[demo.Result], Path]) -> None:
    full, *pruned = ran[0]
    assert full.method == "full KV"
    assert full.kept is None
    assert [row.method.split()[0].lower() for row in pruned] == list(demo.ALL_METHODS)
    for row in pruned:
        assert row.slots == BUDGET
        assert row.cache_bytes < full.cache_bytes
        assert row.compile_s is not None
        assert row.compile_s > 0
        assert row.kept is not None
        assert all(len(head) == BUDGET for layer in row.kept for head in layer)


def test_the_warm_up_compiles_all_that_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short in prompt and answer, it leaves nothing to compile for the long run."""
    counts: list[int] = []
    generate = demo._generate

    def counting(model: Any, inputs: Any, **options: Any) -> Any:
        out = generate(model, inputs, **options)
        counts.append(len(specpass.report(model).graphs))
        return out

    monkeypatch.setattr(demo, "_generate", counting)
    model, tokenizer = hub.load(folder, dtype="float32")
    (method,) = demo.demo_methods(BUDGET, ["speckvpc"])
    specpass.compile(model, draft=model, method=method, lowering="eager")
    demo.measure("SpecKVPC", model, tokenizer, prompt_of(folder), build_prompt(tokenizer, demo.WARM_UP_TOKENS))
    assert counts == [2, 2]


def test_a_method_of_ones_own_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = ["toy = demo_method:Toy", "broken = no_such_module:Toy", "snapkv = demo_method:Toy"]
    announce(tmp_path, monkeypatch, "demo_method", SNAP, points)
    with pytest.warns(UserWarning, match="is left out") as caught:
        methods = demo.demo_methods(64)
    assert [str(warning.message).split(" of ")[0] for warning in caught] == [
        "specpass: the method snapkv = demo_method:Toy",
        "specpass: the method broken = no_such_module:Toy",
    ]
    assert [method.name for method in methods] == ["SnapKV", "SpecKV", "Toy"]
    assert (methods[-1].budget, methods[-1].window) == (64, 32)
    assert type(methods[0]) is specpass.SnapKV


def test_the_picture_is_a_png_with_a_panel_for_each_method(ran: tuple[list[demo.Result], Path], folder: Path) -> None:
    from matplotlib.image import imread

    image = imread(ran[1] / "kept.png")
    assert image.shape[0] > 400
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.5) & (image[..., 2] < 0.5)
    assert red.any(axis=1).sum() > 100  # the answer's mark runs through the panels
    full_only = pictures.png(ran[0][:1], prompt_of(folder), "nothing was pruned")
    assert full_only.startswith(b"\x89PNG")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.spans: list[str] = []
        self.marked: list[int] = []
        self.outside: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.outside += [value for key, value in attrs if key in ("src", "href") and value]
        if tag == "span" and "data-i" in given:
            self._inside = True
            self.spans.append("")
            if given.get("class") == "a":
                self.marked.append(int(given["data-i"] or -1))

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.spans[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def test_the_page_says_who_kept_each_token(ran: tuple[list[demo.Result], Path], folder: Path) -> None:
    text, prompt = (ran[1] / "kept.html").read_text(), prompt_of(folder)
    page = _Page()
    page.feed(text)
    assert page.spans == list(prompt.tokens)
    assert page.marked == list(prompt.answer)
    assert not page.outside  # self-contained
    assert "http" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    found = re.search(r"const methods = (\[.*?\]);\n", text, flags=re.S)
    assert found is not None
    for data, row in zip(json.loads(found.group(1)), ran[0][1:], strict=True):
        assert data["method"] == row.method
        assert row.kept is not None
        for i in (0, prompt.answer.start, len(prompt) - 1):
            assert data["heads"][i] == sum(i in head for layer in row.kept for head in layer)
            assert data["layers"][i] == sum(any(i in head for head in layer) for layer in row.kept)
        assert sum(data["heads"]) == BUDGET * data["all_heads"]
    assert html.escape(ran[0][0].answer) in text


def test_a_prompt_cannot_break_out_of_the_page(ran: tuple[list[demo.Result], Path]) -> None:
    row = dataclasses.replace(ran[0][1], method="</script><b>", answer="<i>", kept=(((0, 1),),))
    text = pictures.page([row], Prompt({}, ("<script>alert(1)</script>", "&amp;"), range(1, 2)), "a & b")
    assert "<script>alert" not in text
    assert "</script><b>" not in text
    assert "<i>" not in text
    assert "&amp;amp;" in text


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app,
        [
            "demo",
            "-t",
            str(folder),
            "-d",
            str(folder),
            "-b",
            "40",
            "--tokens",
            "300",
            "--dtype",
            "float32",
            "--lowering",
            "eager",
            "--out",
            str(tmp_path / "o"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "SpecKV 40" in result.stdout
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["kept.html", "kept.png"]
