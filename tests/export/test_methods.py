"""Every method as an export, and KV heads that share budgets: PyTorch's tokens and kept positions, in float32; batches
equal single rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_cases import METHODS, NEW, PROMPTS, Case, check_equal_to_torch, make
from tiny import tiny

import specpass
from specpass import runtime
from specpass.runtime.session import ROOM_STEP

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


@pytest.mark.parametrize(
    ("method", "layers", "most"),
    [  # most: M of K = 2 heads, each of which keeps its window of 8 and a fifth of the rest at least
        (dataclasses.replace(METHODS["snapkv"], spread="heads"), 1, 8 + 2 * 16 - 3),
        (dataclasses.replace(METHODS["speckvpc"], spread="global"), 2, 8 + 4 * 8 - 3 * 1),  # of 16 slots; 2 layers
    ],
)
def test_heads_share_budgets(method: Any, layers: int, most: int, tmp_path: Path) -> None:
    """Each head is padded to M, and in the runtime to the longest of them. The draft is the target: its lookahead is
    followed where the target reads all of the prompt."""
    target = tiny("llama", layers=layers)
    draft = tiny("llama", layers=layers) if method.drafts else None
    specpass.export_onnx(target, draft, method, tmp_path / "out")
    model = runtime.load(tmp_path / "out", threads=1)
    check_equal_to_torch(Case(tmp_path / "out", model, target, draft, method))
    assert model.state is not None
    assert model.state.free_tokens == (method.lookahead if method.drafts else 0)
    alone = [model.generate([own], max_new_tokens=NEW)[0] for own in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=NEW) == alone
    state = model.state
    assert model.bundle.budgets == (most,) * layers
    assert {own.shape[2] for own in state.positions} == {most}
    kept = np.stack([(own >= 0).sum(-1) for own in state.positions])
    longest = int(kept.max())
    assert len(np.unique(kept)) > 2
    assert most > longest > method.budget
    assert {value.shape()[2] for value in state.storage.values()} == {longest + ROOM_STEP}
