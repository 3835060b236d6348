"""bench/gpu.py, whole, on a CPU with tiny sizes: every kernel right, every step there, one valid document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from specpass.kernels.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_runs_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    environment = {**os.environ, "SPECPASS_CACHE": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["settings"]["tiny"]
    assert "times mean nothing" in found["note"]
    assert list(dict.fromkeys(name.split(",")[0] for name in found["correctness"])) == list(REGISTRY)
    for kernel in ("importance", "importance_given_lse"):
        assert any(
            name.startswith(f"{kernel},") and name.endswith("sum of weighted rows") for name in found["correctness"]
        )
    assert all(step["error_share"] <= 1.0 for step in found["correctness"].values())
    assert found["floors"].keys() == REGISTRY.keys()
    for step in found["floors"].values():
        assert min(step["cold_us"], step["warm_us"], step["floor_us"], step["peers_us"]["aten"]) > 0
    assert found["floors"]["decode"]["peers_us"].keys() == {"aten", "sdpa"}
    assert found["floors"]["decode_append"]["peers_us"]["append, then decode"] > 0
    assert found["full_kv"]["decode attention"]["times_faster"] > 0
    timed = [step for step in found["end_to_end"].values() if "skipped" not in step]
    assert len(timed) >= 4
    assert all(
        step["first_token_s"] > 0 and step["decode_tokens_s"] > 0 and step["bound_tokens_s"] > 0 for step in timed
    )


def test_steps_beyond_the_time_limit_are_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        str(ROOT / "bench" / "gpu.py"),
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "0",
        "--skip-models",
        "--out",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert run.returncode == 1  # nothing was found right
    assert set(map(str, json.loads(out.read_text())["correctness"].values())) == {"{'skipped': 'out of time'}"}
