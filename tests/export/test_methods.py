"""Every method as an export: PyTorch's tokens and kept positions, in float32; batches equal single rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from onnx_cases import METHODS, NEW, PROMPTS, check_equal_to_torch, make

pytest.importorskip("onnxruntime")


def test_a_sampling_draft_writes_torchs_lookahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are unrolled, and its noise is a function of seed and step alone. The target reads sparsely besides,
    and scores by outputs."""
    drawn = {"lookahead": 3, "temperature": 0.7, "seed": 5}
    sampled = dataclasses.replace(METHODS["speckv"], **drawn, sparse_prefill=16, reconstruction=True)
    monkeypatch.setitem(METHODS, "sampled", sampled)
    check_equal_to_torch(make(tmp_path / "out", "smollm", "sampled", layers=1), PROMPTS[:2])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "speckv"])
def test_tokens_and_positions_are_torchs(method: str, tmp_path: Path) -> None:
    # One layer where layers do not differ; several are in test_folder.py.
    case = make(tmp_path / method, "llama", method, layers=2 if method == "pyramidkv" else 1)
    check_equal_to_torch(case)
    alone = [case.model.generate([own], max_new_tokens=NEW)[0] for own in PROMPTS]
    assert case.model.generate(PROMPTS, max_new_tokens=NEW) == alone
