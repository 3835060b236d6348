"""Every method as an export, and KV heads that share budgets: PyTorch's tokens and kept positions, in float32; batches
equal single rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from onnx_cases import METHODS, NEW, PROMPTS, WINDOW, Case, check_equal_to_torch, make
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
    alone = [case.model.generate([own], max_new_tokens=ROOM_STEP)[0] for own in PROMPTS]  # all slots, of each layer
    assert case.model.generate(PROMPTS, max_new_tokens=ROOM_STEP) == alone


def test_heads_of_all_layers_share_budgets(tmp_path: Path) -> None:
    """Each is padded to M, and in the runtime to the longest of them. The draft is the target, whose answer follows
    the lookahead."""
    method = dataclasses.replace(METHODS["speckv"], spread="global")
    target, draft = (tiny("llama", layers=2) for _ in range(2))
    folder = specpass.export_onnx(target, draft, method, tmp_path / "out")
    model, prompts = runtime.load(folder, threads=1), PROMPTS[1:]
    check_equal_to_torch(Case(folder, model, target, draft, method), prompts)
    assert model.state is not None
    assert model.state.free_tokens == method.lookahead
    alone = [model.generate([own], max_new_tokens=NEW)[0] for own in prompts]
    assert model.generate(prompts, max_new_tokens=NEW) == alone
    positions, storage = model.state.positions, model.state.storage.values()
    floor, heads = (method.budget - WINDOW) // 5, 4  # of two layers
    most = WINDOW + heads * (method.budget - WINDOW) - (heads - 1) * floor
    assert model.bundle.budgets == tuple(own.shape[2] for own in positions) == (most, most)
    kept = np.stack([(own >= 0).sum(-1) for own in positions])
    assert len(np.unique(kept)) > 2
    assert method.budget < kept.max() < most
    assert {value.shape()[2] for value in storage} == {kept.max() + ROOM_STEP}
