"""Experts in float32: what multiplies them outside of a graph has a form in one in bfloat16 alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny

import specpass
from specpass.errors import ExportError

METHOD = specpass.SpecKV(budget=24, window=8, lookahead=4)


def test_a_draft_of_experts_is_captured_before_any_compiled_call() -> None:
    model = specpass.compile(
        tiny("mixtral"), draft=tiny("mixtral", layers=1, seed=1), method=METHOD, lowering="eager", dropped="host"
    )
    ids = prompt(40)
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=4)
    model.generate(ids, max_new_tokens=4, past_key_values=cache, do_sample=False)
    assert cache.lookahead_ids is not None
    assert not specpass.report(model).refusals
    assert not torch.compiler.is_compiling()


def test_an_export_names_the_experts_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"experts: the operator transformers\.grouped_mm_fallback"):
        specpass.export_onnx(tiny("mixtral", layers=1), method=specpass.SnapKV(24, window=8), out=tmp_path / "onnx")
    assert not list(tmp_path.iterdir())
