"""Coverage: a shard of the committed file is tried live; faults are told from what is exact; the page is the file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specpass.benchmarks.coverage import page, run
from specpass.benchmarks.coverage.families import left_out, registered
from specpass.benchmarks.coverage.probe import probe, verdict
from specpass.errors import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]
SHARD = ("gemma3_text", "lfm2")  # windows, states


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "coverage.json").read_text())


@pytest.mark.parametrize("family", SHARD)
def test_a_shard_is_as_committed(family: str, committed: dict[str, Any]) -> None:
    records = {record["family"]: record for record in committed["results"]}
    found = probe(family)
    assert found["verdict"] == "pruned", found
    if family in records:
        assert found == records[family]


def test_the_page_is_made_of_the_file(committed: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "coverage.md").read_text() == page.page(committed)


def test_families_are_tried_or_left_out_for_a_reason() -> None:
    reasons = {family: left_out(family) for family in registered()}
    assert sum(not reason for reason in reasons.values()) >= 60
    assert (reasons["bart"], reasons["bert"]) == ("half of an encoder-decoder", "an encoder")
    assert not reasons["llama"] + reasons["qwen3_next"] + reasons["gemma3_text"]


@pytest.mark.parametrize(
    ("full", "pruned", "faults", "word"),
    [
        (2, 2, {}, "pruned"),
        (2, 1, {}, "in part"),
        (2, 0, {}, "exact"),
        (0, 0, {}, "nothing to prune"),
        (2, 2, {"batch": "row 0, token 1: logits differ by 3 of 9"}, "wrong"),
        (2, 2, {"exact": "error: CacheStateError: no room"}, "error"),
        (2, 2, {"batch": "row 0", "specpc": "traceback: KeyError: 3"}, "traceback"),
    ],
)
def test_verdicts(full: int, pruned: int, faults: dict[str, str], word: str) -> None:
    assert verdict({"layers": {"full": full} if full else {}, "pruned": pruned, "faults": faults}) == word


def _ends(*_: Any) -> None:
    raise SystemExit(3)


def _sleeps(*_: Any) -> None:
    import time

    time.sleep(60)


@pytest.mark.parametrize(("child", "fault"), [(_ends, "the process ended with 3"), (_sleeps, "no result within 1 s")])
def test_a_process_that_sends_nothing_is_a_fault(tmp_path: Path, child: Any, fault: str) -> None:
    limit = 1.0 if child is _sleeps else 120.0
    record = run.Run(tmp_path / "c.json", limit=limit).record("llama", child)
    assert (record["verdict"], record["faults"]) == ("traceback", {"process": fault})


def test_a_run_goes_on_where_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def record(self: run.Run, family: str, probe: Any) -> dict[str, Any]:
        tried.append(family)
        return {"family": family, "verdict": "left out", "reasons": ["an encoder"]}

    monkeypatch.setattr(run.Run, "record", record)
    path = tmp_path / "coverage.json"
    run.Run(path, shard=(1, 2)).run()
    assert tried == registered()[::2]
    store = run.Run(path).run()
    assert sorted(tried) == registered() == [key[0] for key in store.records]
    with pytest.raises(BenchmarkError, match="'gpt5' is no causal language model"):
        run.Run(path, only=("gpt5",)).run()
