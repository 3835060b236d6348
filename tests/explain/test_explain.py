"""`specpass explain` and the report: sites, refusals, budgets, costs and pictures, from stand-ins and from weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_models import save_model
from rich.console import Console
from support import call, compile_eager
from tiny import prompt, tiny
from typer.testing import CliRunner

import specpass
from specpass import cli, hub
from specpass.cli import explain as cli_explain
from specpass.explain.stand_in import stand_in
from specpass.reports import cost
from specpass.reports.text import cost_lines
from specpass.sizes import Decoder

runner = CliRunner()
EAGER = ["--lowering", "eager", "--window", "8", "-b", "24", "--lookahead", "4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "target", family="qwen2", layers=3), save_model(root / "draft", family="qwen2", seed=1)


def explain(target: Path, *args: str) -> Any:
    return runner.invoke(cli.app, ["explain", "-t", str(target), *EAGER, *args])


def test_data_of_a_pair_without_its_weights(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("the weights were loaded"))
    result = explain(pair[0], "-d", str(pair[1]), "--json", "-n", "16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["method"] == specpass.SpecKV(24, window=8, lookahead=4).key
    assert {graph["kind"]: len(graph["sites"]) for graph in found["graphs"]} == {"prefill": 3, "decode": 3}
    site = {"module": "model.layers.2.self_attn", "budget": 24, "exact": "", "reads": "", "spread": "uniform"}
    site["unquantized"] = ""
    assert found["graphs"][0]["sites"][2] == site
    assert found["graphs"][0]["seconds"] > 0
    costs = found["costs"]
    assert costs["numbers"]["4096"]["kv_bytes"]["full"] == 2 * 3 * 2 * 16 * 4096 * 4  # of the real sizes
    assert costs["numbers"]["4096"]["kv_bytes"]["method"] < costs["numbers"]["4096"]["kv_bytes"]["full"]
    assert costs["numbers"]["131072"]["draft_flops"]["method"] > 0
    assert "S**2" in costs["formulas"]["prefill_flops"]["full"] or "S*" in costs["formulas"]["prefill_flops"]["full"]
    assert set(costs["break_even"]) == {"kv_bytes", "bytes", "flops"}
    assert costs["break_even"]["kv_bytes"] > 24


def test_a_lookahead_that_nobody_named(pair: tuple[Path, Path]) -> None:
    options = ["-d", str(pair[1]), "-m", "speckv", "-b", "96", "--lowering", "eager", "--json"]
    result = runner.invoke(cli.app, ["explain", "-t", str(pair[0]), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert not found["refusals"]
    assert "lookahead=None" in found["method"]


def test_a_lookahead_of_the_targets_own_has_steps_alone_and_its_peak(pair: tuple[Path, Path]) -> None:
    """No prompt's graph; bytes that are held at once, of the real sizes."""
    result = explain(pair[0], "--lookahead", "self", "--json", "-n", "16", "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {graph["kind"] for graph in found["graphs"]} == {"decode"}
    assert found["whole"] is None  # of a stand-in
    numbers = found["costs"]["numbers"]["4096"]["kv_bytes"]
    assert found["costs"]["held"]["4096"] == numbers["full"] + numbers["method"]
    costs = cost.costs_of(specpass.SpecKV(24, 8, lookahead="self"), Decoder(3, 64, 4, 2, 16, 96, 128, 3, 4))
    assert costs is not None
    assert "until the lookahead was read)" in "".join(cost_lines(costs))


def test_the_stand_in_is_rewritten_like_the_model(pair: tuple[Path, Path]) -> None:
    def sites(*args: str) -> Any:
        found = json.loads(explain(pair[0], "-d", str(pair[1]), "--json", *args).stdout)
        return [(graph["kind"], graph["sites"], graph["exact"]) for graph in found["graphs"]], found["costs"]

    assert sites() == sites("--weights")


def test_a_refusal_names_the_models_own_module(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "masked", family="doge")
    found = json.loads(
        runner.invoke(cli.app, ["explain", "-t", str(folder), "-m", "snapkv", *EAGER[:-2], "--json"]).stdout
    )
    assert any("model.layers.0.self_attn: attention mask: unknown" in reason for reason in found["refusals"])
    assert all(graph["exact"] for graph in found["graphs"])
    text = runner.invoke(cli.app, ["explain", "-t", str(folder), "-m", "snapkv", *EAGER[:-2]])
    assert "refused: " in text.stdout


def test_a_ratio_is_resolved_for_each_length(pair: tuple[Path, Path]) -> None:
    result = runner.invoke(
        cli.app,
        [
            "explain",
            "-t",
            str(pair[0]),
            "-m",
            "snapkv",
            "-b",
            "0.25",
            "--window",
            "8",
            "--lowering",
            "eager",
            "--json",
            "-n",
            "64",
        ],
    )
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)["costs"]["numbers"]
    for length in (4096, 32768):
        kept = 2 * 3 * 2 * 16 * 4 * (length // 4 + 64) + 8 * 3 * 2 * (length // 4 + 1)
        assert numbers[str(length)]["kv_bytes"]["method"] == kept


def test_tables(pair: tuple[Path, Path]) -> None:
    text = explain(pair[0], "-d", str(pair[1])).stdout
    for part in (
        "model.layers.0.self_attn .. model.layers.2.self_attn: 24 slots",
        "prefill FLOPs",
        "S = 32,768",
        "pays from a prompt of",
        "as formulas",
        "draft captured in",
    ):
        assert part in text


def test_a_narrow_terminal_gets_lines(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_explain, "Console", lambda **_: Console(width=40))
    text = " ".join(explain(pair[0], "-d", str(pair[1])).stdout.split())
    assert "3 sites rewritten" in text
    assert "pays from a prompt of" in text


def test_tokenizers_are_compared_though_nothing_is_loaded(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", words=60, family="qwen2")
    result = explain(pair[0], "-d", str(other))
    assert result.exit_code == 1
    assert "different tokenizers" in result.stderr


def test_stand_ins_keep_layers_heads_and_layer_types() -> None:
    real = tiny("gemma2", layers=4, num_attention_heads=8, num_key_value_heads=2).config
    small = stand_in(real, real.dtype).config
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "layer_types", "model_type"):
        assert getattr(small, name) == getattr(real, name)
    assert small.vocab_size == 256


def test_graph_as_dot(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "new" / "layer.dot"
    result = explain(pair[0], "-d", str(pair[1]), "--graph", str(path))
    assert result.exit_code == 0, result.output
    before, after = path.read_text().split("cluster_1")
    assert "scaled_dot_product_attention" in before
    assert "importance" not in before
    for operator in ("prefill_attention", "importance", "select", "gather_kv"):
        assert operator in after
    assert "scaled_dot_product" not in after
    assert "(S+L)" in after
    names = set(re.findall(r'"(\w+)" \[label', path.read_text()))
    ends = {name for edge in re.findall(r'"(\w+)" -> "(\w+)"', path.read_text()) for name in edge}
    assert ends <= names
    assert not list(path.parent.glob(".*"))  # no partial file is left


def test_graph_as_svg(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "layer.svg"
    result = runner.invoke(cli.app, ["explain", "-t", str(pair[0]), "-m", "snapkv", *EAGER[:-2], "--graph", str(path)])
    assert result.exit_code == 0, result.output
    text = path.read_text()
    assert text.lstrip().startswith("<?xml")
    assert text.rstrip().endswith("</svg>")


def test_graph_needs_a_known_ending(pair: tuple[Path, Path]) -> None:
    result = explain(pair[0], "-d", str(pair[1]), "--graph", "layer.gif")
    assert result.exit_code == 1
    assert ".svg or .dot" in result.stderr


def test_report_of_a_compiled_model() -> None:
    method = specpass.SpecKV(24, window=8, lookahead=4)
    target, draft = tiny("qwen2"), tiny("qwen2", seed=1)
    compile_eager(target, method, draft)
    assert specpass.report(target).costs() is None  # nothing is known of the target before the first call
    call(target, prompt(40), specpass.BudgetCache(target.config, method, max_new_tokens=4))
    report = specpass.report(target)
    costs = cost.costs_of(method, Decoder.of(target.config), Decoder.of(draft.config))
    assert report.costs() == costs
    assert json.loads(json.dumps(report.data()))["graphs"][0]["kind"] == "prefill"
    assert "at 32,768 tokens: KV cache 16.0 MiB" in str(report)
    console = Console(width=160)
    with console.capture() as captured:
        console.print(report)
    assert "2 slots" not in captured.get()
    assert "model.layers.0.self_attn .. model.layers.1.self_attn: 24 slots per KV head" in captured.get()
