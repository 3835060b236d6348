"""SpecKV on architectures besides Llama as exports: PyTorch's tokens, kept positions and lookahead, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_cases import NEW, PROMPTS, check_equal_to_torch, make

pytest.importorskip("onnxruntime")

FAMILIES = ["smollm", "qwen2", "qwen3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_positions_are_torchs(family: str, tmp_path: Path) -> None:
    case = make(tmp_path / family, family, layers=1)
    check_equal_to_torch(case)
    alone = [case.model.generate([own], max_new_tokens=NEW)[0] for own in PROMPTS]
    assert case.model.generate(PROMPTS, max_new_tokens=NEW) == alone


@pytest.mark.parametrize("method", ["speckv", "none"])
def test_soft_caps_are_exported(method: str, tmp_path: Path) -> None:
    settings = {"attn_logit_softcapping": 0.5, "layer_types": ["full_attention"]}
    case = make(tmp_path / "gemma2", "gemma2", method, layers=1, **settings)
    check_equal_to_torch(case)
    alone = [case.model.generate([own], max_new_tokens=NEW)[0] for own in PROMPTS]
    assert case.model.generate(PROMPTS, max_new_tokens=NEW) == alone
