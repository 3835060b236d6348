"""bench/gpu.py, whole, on a CPU with tiny sizes: every kernel and token right, every step there, valid documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specpass.kernels.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tokens", "kernels", "models")


def script(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """The script's run, and its documents by part."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(folder)]
    environment = {**os.environ, "SPECPASS_CACHE": str(folder)}
    run = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, env=environment, timeout=900)
    files = {part: folder / f"gpu_{part}_tiny.json" for part in PARTS}
    return run, {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    run, documents = script(tmp_path_factory.mktemp("gpu"))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert documents.keys() == set(PARTS)
    for document in documents.values():
        assert document["settings"]["tiny"]
        assert "times mean nothing" in document["note"]
    return documents


def test_tokens(found: dict[str, dict[str, Any]]) -> None:
    steps = found["tokens"]["tokens"]
    assert len(steps) == 8  # of one method, on a CPU
    assert all(step["right"] for step in steps.values())


def test_kernels(found: dict[str, dict[str, Any]]) -> None:
    document = found["kernels"]
    assert list(dict.fromkeys(name.split(",")[0] for name in document["correctness"])) == list(REGISTRY)
    for kernel in ("importance", "importance_given_lse"):
        assert any(
            name.startswith(f"{kernel},") and name.endswith("sum of weighted rows") for name in document["correctness"]
        )
    assert all(step["error_share"] <= 1.0 for step in document["correctness"].values())
    assert document["floors"].keys() == REGISTRY.keys()
    for step in document["floors"].values():
        assert min(step["cold_us"], step["warm_us"], step["floor_us"], step["peers_us"]["aten"]) > 0
    assert document["floors"]["decode"]["peers_us"].keys() == {"aten", "sdpa"}
    assert document["floors"]["decode_append"]["peers_us"]["append, then decode"] > 0
    assert len(document["decode"]) == 9
    assert all(step["ours_us"] > 0 and step["peers_us"]["sdpa"] > 0 for step in document["decode"].values())
    assert all(step["us"] > 0 for step in document["selection"].values())
    assert all(min(step["us"][way] for way in ("specpass", "importance")) > 0 for step in document["prefill"].values())
    assert all(step["us"]["specpass"] > 0 for step in document["sparse"].values())
    assert document["full_kv"]["decode attention"]["times_faster"] > 0


def test_models(found: dict[str, dict[str, Any]]) -> None:
    steps = found["models"]["end_to_end"]
    assert len(steps) == 5
    assert all(step["first_token_s"] > 0 and step["bound_tokens_s"] > 0 for step in steps.values())
    breakdown = found["models"]["breakdown"]
    assert all(step["first_token"]["busy_ms"] > 0 for step in breakdown.values())
    assert breakdown["SpecKV"]["draft_step_ms"] > 0
    assert breakdown["full KV"]["draft_step_ms"] is None


def test_steps_beyond_the_time_limit_are_named(tmp_path: Path) -> None:
    run, documents = script(tmp_path, "--minutes", "0", "--part", "kernels")
    assert run.returncode == 1  # nothing was found right
    assert set(map(str, documents["kernels"]["correctness"].values())) == {"{'skipped': 'out of time'}"}
