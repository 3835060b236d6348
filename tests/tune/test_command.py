"""`specpass tune`: what it writes, stores and finds again, with compilation replaced by a note."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specpass import cli
from specpass.cli.tune import choose_arch
from specpass.errors import UnknownArchError
from specpass.kernels import archs, cost, dispatch, tuner
from specpass.kernels.archs import ARCHS
from specpass.kernels.registry import REGISTRY
from specpass.kernels.store import Trial
from specpass.kernels.tiles import Tile
from specpass.kernels.tuner import Job

FIELDS = {"kernel", "arch", "dtype", "shapes", "config", "regs", "spills", "shared_bytes", "measured"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path))


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A folder with a config and nothing else."""
    folder = tmp_path / "target"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def tune(target: str, *more: str) -> Any:
    arguments = ["tune", "--target", target, "--budget", "64,128", "--arch", "sm_90", "--tiles", "2", "--jobs", "1"]
    return CliRunner().invoke(cli.app, [*arguments, *more])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """Compilation replaced by a note of what was asked for."""
    seen: list[Tile] = []

    def fake(job: Job, tile: Tile) -> Trial:
        seen.append(tile)
        return Trial(tile, 40, 0, 2048, cost.seconds(job.kernel, job.shapes, tile, job.arch))

    monkeypatch.setattr(tuner, "compile_trial", fake)
    monkeypatch.setattr("specpass.kernels.dispatch.triton_installed", lambda: True)
    return seen


def test_tune_writes_winners_and_the_next_run_finds_them(target: str, tmp_path: Path, compiled: list[Tile]) -> None:
    out = tmp_path / "out.json"
    first = tune(target, "--json", str(out))
    assert first.exit_code == 0, first.output
    assert "not measured" in " ".join(first.stderr.split())
    rows = json.loads(out.read_text())
    assert all(row.keys() >= FIELDS and row["measured"] is False for row in rows)
    # A draft's step that scores is SpecPC's, and attention is sparse, or scores weigh outputs, where a method says so.
    # Caches in fewer bits are an option of no method.
    left = {"decode_append_lse", "sparse_prefill", "reconstruction", "decode_codes"}
    assert {row["kernel"] for row in rows if row["config"]} == set(REGISTRY) - left
    assert {row["kernel"] for row in rows if not row["config"]} == {
        "select",
        "prefill_attention",
        "prefill_attention_lse",
        "append_kv",
        "attend_cascade",
    }
    assert len(compiled) == 2 * (2 + 2 * 3)  # importance does not depend on the budget
    again = tune(target, "--emit", str(tmp_path / "modules"))
    modules = sorted(path.name for path in (tmp_path / "modules").glob("*.py"))
    assert len(modules) == 8
    assert "gather_384_sm_90.py" in modules
    # 128, and 32 of the lookahead, kept for an answer that follows it
    assert "C = tl.constexpr(160)" in (tmp_path / "modules" / "gather_384_sm_90.py").read_text()
    assert "nothing to do: all 8 kernels are in the store" in again.stderr
    assert len(compiled) == 16
    assert "8 in " in CliRunner().invoke(cli.app, ["tune", "--list"]).stdout
    assert "removed 8" in CliRunner().invoke(cli.app, ["tune", "--clear"]).stdout
    assert "0 in " in CliRunner().invoke(cli.app, ["tune", "--list"]).stdout


def test_a_run_that_is_cut_off_goes_on_where_it_was(
    target: str, compiled: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tuner.compile_trial

    def cut(job: Job, tile: Tile) -> Trial:
        if len(compiled) == 5:
            raise KeyboardInterrupt
        return real(job, tile)

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "compile_trial", cut)
        run = tune(target)
    assert run.exit_code == 130
    assert "goes on from here" in run.stderr
    assert len(compiled) == 5
    assert tune(target).exit_code == 0
    assert len(compiled) == 16  # nothing twice


def test_the_gpu_here_is_tuned_for_whatever_it_is(
    target: str, tmp_path: Path, compiled: list[Tile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orin is on no data sheet here, a 4090 is, and an L4 is one of its kind with fewer processors."""
    orin = dataclasses.replace(ARCHS["sm_86"], name="sm_87", capability=87, units=16)
    monkeypatch.setattr(dispatch, "refused", lambda arch: None)
    monkeypatch.setattr(tuner, "measure_trial", lambda job, trial: dataclasses.replace(trial, time_us=1.0))
    for device in (orin, dataclasses.replace(ARCHS["sm_89"], units=58)):
        for module in (archs, tuner):
            monkeypatch.setattr(module, "device_arch", lambda index=0, device=device: device)
        assert choose_arch("") is choose_arch(device.name) is device
        run = CliRunner().invoke(
            cli.app, ["tune", "-t", target, "-b", "64", "--jobs", "1", "--json", str(tmp_path / "f")]
        )
        assert run.exit_code == 0, run.output
        rows = [row for row in json.loads((tmp_path / "f").read_text()) if row["config"]]
        assert {(row["arch"], row["measured"]) for row in rows} == {(device.kind, True)}
    monkeypatch.setattr(dispatch, "refused", lambda arch: f"Triton 3.6.0 does not compile for {arch.name}")
    monkeypatch.setattr(archs, "device_arch", lambda index=0: orin)
    with pytest.raises(UnknownArchError, match=r"Triton 3\.6\.0 does not compile for sm_87.* Update Triton"):
        choose_arch("")
    assert choose_arch("sm_103") is ARCHS["sm_103"]


MISTAKES = [
    (["--arch", "sm_1"], "sm_80, sm_86, sm_89, sm_90"),
    (["--budget", "lots"], "256,512,1024"),
    (["--budget", "8"], "window"),
]


@pytest.mark.parametrize(("more", "fix"), MISTAKES)
def test_mistakes_are_one_message_with_the_fix(target: str, more: list[str], fix: str, compiled: list[Tile]) -> None:
    run = tune(target, *more)
    assert run.exit_code == 1
    assert fix in run.stderr
    assert not compiled
