"""`specpass explain --tokens`: what each of several devices holds and does, against sums by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_models import save_model
from tiny import tiny
from typer.testing import CliRunner

import specpass
from specpass import cli, hub
from specpass.explain.plan import PEAKS, Plan, plan
from specpass.kernels.archs import ARCHS

runner = CliRunner()
S = 1_000_000
SPECKV = specpass.SpecKV(budget=1024, window=32, lookahead=32)


def planned(method: Any, devices: int = 2, **settings: Any) -> tuple[Plan, Any]:
    config, small = tiny("qwen2", layers=3, **settings).config, tiny("qwen2", layers=2, seed=1).config
    draft = small if method.needs_draft else None
    found = plan(config, draft, method, tokens=S, devices=devices, arch=ARCHS["sm_90"], itemsizes=(2, 2))
    return found, config


def test_a_device_holds_its_part_and_the_whole_draft() -> None:
    (found, config), (alone, _) = planned(SPECKV), planned(SPECKV, 1)
    heads, kv_heads, head = config.num_attention_heads // 2, config.num_key_value_heads // 2, config.hidden_size // 4
    hidden, inner, vocab = config.hidden_size, config.intermediate_size // 2, config.vocab_size // 2
    layer = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * inner
    matrices = 2 * (3 * layer + hidden * (vocab + (0 if config.tie_word_embeddings else config.vocab_size)))
    assert found.held["target weights"] == (matrices, matrices)
    whole, pruned = found.held["target K/V while it reads"]
    kept = found.held["cache while it answers"][1]
    assert whole == 2 * 3 * kv_heads * head * S * 2
    assert pruned == 2 * kv_heads * head * (S + 32) * 2 + kept
    assert kept * 2 == pytest.approx(alone.held["cache while it answers"][1], rel=1e-3)  # but for the lookahead's ids
    assert kept < whole / 100
    assert found.held["draft K/V of the prompt"] == alone.held["draft K/V of the prompt"]
    assert found.held[PEAKS[1]][0] == sum(
        found.held[name][0] for name in ("target weights", "target K/V while it reads", "target activations of a layer")
    )


def test_an_mlp_is_read_in_pieces_behind_attention() -> None:
    found, config = planned(SPECKV, intermediate_size=4096)
    hidden, inner = config.hidden_size, 4096 // 2
    rows, piece = S + 32, (512 << 20) // (2 * inner)
    whole, own = found.held["target activations of a layer"]
    assert whole == 2 * S * (2 * hidden + 2 * inner)
    assert own == 2 * (rows * (2 * hidden + hidden // 2) + piece * (hidden + 2 * inner))


def test_a_target_that_writes_its_own_lookahead_holds_all_of_the_prompt_until_then() -> None:
    found, _ = planned(specpass.SpecKV(budget=1024, window=32, lookahead="self"))
    whole, pruned = found.held["target K/V while it reads"]
    assert pruned == whole + found.held["cache while it answers"][1]
    steps = found.work["draft"]
    assert steps["flops"] == (0, pytest.approx(31 * found.work["decode"]["flops"][1]))
    assert steps["sent"][1] == 31 * found.work["decode"]["sent"][1]
    assert any("its own draft" in note for note in found.notes)


def test_floors_are_flops_or_bytes_whichever_take_longer() -> None:
    found, config = planned(SPECKV)
    heads, head = config.num_attention_heads // 2, config.hidden_size // 4
    flops, arch = found.work["prefill"]["flops"][0], ARCHS["sm_90"]
    attention = 2 * S * S * 3 * heads * head  # the half below the diagonal: queries by keys, and by values
    assert attention < flops < 1.1 * attention
    assert found.work["prefill"]["seconds"][0] == pytest.approx(flops / arch.flops)
    step = found.work["decode"]
    assert step["seconds"] == pytest.approx(tuple(moved / arch.bandwidth for moved in step["bytes"]))
    assert step["sent"] == (
        2 * 3 * config.hidden_size * 2,
        2 * 3 * config.hidden_size * 2,
    )  # two sums a layer, a ring of 2
    assert planned(SPECKV, 1)[0].work["decode"]["sent"] == (0, 0)


def test_a_compressed_prompt_is_read_short_and_candidates_are_held() -> None:
    short, _ = planned(specpass.SpecPC(budget=2048))
    full, own = short.work["prefill"]["seconds"]
    assert own < full / 1e4
    assert short.work["draft"]["seconds"][1] > own
    even, together = planned(specpass.SnapKV(budget=1024))[0], planned(specpass.SnapKV(budget=1024, spread="global"))[0]
    name = "target K/V while it reads"
    assert together.held[name][1] - even.held[name][1] > 2 * even.held["cache while it answers"][1]
    assert "draft" not in even.work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "target", family="qwen2", layers=3))


def explain(model: str, *args: str) -> Any:
    return runner.invoke(cli.app, ["explain", "-t", model, "-m", "snapkv", "-b", "64", *args])


def test_command(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("the weights were loaded"))
    data = json.loads(explain(model, "--tokens", "1000000", "--devices", "2", "--json").stdout)
    assert data["devices"] == 2
    assert data["held"]["cache while it answers"]["method"] < data["held"]["cache while it answers"]["full"]
    assert data["arch"]["flops_per_s"] == ARCHS["sm_90"].flops
    shown = explain(model, "--tokens", "1000000", "--arch", "sm_80").stdout
    assert "one device" in shown
    assert "312 TFLOP/s" in shown
    assert "the target was made for" in shown
    assert "sent" not in shown


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--devices", "2"], "--tokens"),
        (["--arch", "sm_80"], "--tokens"),
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "1000", "--weights"], "--weights"),
    ],
)
def test_options_that_do_not_go_together_are_2(model: str, args: list[str], text: str) -> None:
    result = explain(model, *args)
    assert result.exit_code == 2
    assert text in result.stderr
