"""Exports in float16 and with int8 weights: smaller files, the same graphs, answers near those of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_cases import METHODS, NEW, PROMPTS, pair

import specpass
from specpass import runtime

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WIDE = {"layers": 1, "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.08}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> runtime.Runtime:
    target, draft = pair("llama", **WIDE)
    return runtime.load(specpass.export_onnx(target, draft, METHODS["speckv"], tmp_path_factory.mktemp("full") / "out"))


def check_near(full: runtime.Runtime, model: runtime.Runtime, tolerance: float) -> None:
    assert [len(row) for row in model.generate(PROMPTS, max_new_tokens=NEW)] == [NEW] * len(PROMPTS)
    exact, near = (one.prefill(PROMPTS[:1]) for one in (full, model))
    spread = float(exact.logits.max() - exact.logits.min())
    assert np.abs(exact.logits - near.logits.astype(np.float32)).max() < tolerance * spread
    shared = [
        len(set(ours) & set(other)) / len(ours)
        for layer, layer2 in zip(exact.positions, near.positions, strict=True)
        for ours, other in zip(layer[0].tolist(), layer2[0].tolist(), strict=True)
    ]
    assert min(shared) > 0.5


def data_bytes(model: runtime.Runtime) -> int:
    return sum(path.stat().st_size for path in model.folder.glob("*_data"))


def test_float16(full: runtime.Runtime, tmp_path: Path) -> None:
    models: Any = [model.to(torch.float16) for model in pair("llama", **WIDE)]
    model = runtime.load(specpass.export_onnx(*models, METHODS["speckv"], tmp_path / "out"))
    assert model.bundle.dtype == "float16"
    assert data_bytes(model) < 0.52 * data_bytes(full)
    assert model.prefill(PROMPTS).cache_bytes * 2 == full.prefill(PROMPTS).cache_bytes
    check_near(full, model, 0.02)


def test_int8_weights(full: runtime.Runtime, tmp_path: Path) -> None:
    folder = specpass.export_onnx(*pair("llama", **WIDE), METHODS["speckv"], tmp_path / "out", weights="int8")
    model = runtime.load(folder, verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert data_bytes(model) < 0.4 * data_bytes(full)
    for name in ("prefill.onnx", "decode.onnx"):
        tensors = onnx.load(folder / name, load_external_data=False).graph.initializer
        stored = {tensor.name: tensor.data_type for tensor in tensors}
        assert stored["target.model.layers.0.mlp.up_proj.weight_quantized"] == onnx.TensorProto.INT8
    check_near(full, model, 0.1)
