"""PEFT models: the decoder inside is compiled, and answers with the adapter that is active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import check_answer, compile_eager, kept, run
from tiny import prompt, tiny

import specpass
from specpass.errors import UnsupportedCallError

peft = pytest.importorskip("peft")

C, W = 24, 8
METHOD = specpass.SnapKV(budget=C, window=W)


def adapted() -> Any:
    """A tiny model with two adapters that change its answers; "one" is active."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny(layers=1), config, adapter_name="one")
    model.add_adapter("two", config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def check(model: Any, twin: Any) -> list[list[int]]:
    ours = run(model, prompt(60), 4)
    assert ours.cache.layers[0].positions.shape[2] == C
    check_answer(ours, twin.get_base_model() if hasattr(twin, "get_base_model") else twin, prompt(60), kept(ours.cache))
    return ours.tokens


def test_adapters_are_switched_off_and_merged_later() -> None:
    model, twin = compile_eager(adapted(), METHOD), adapted()
    assert type(model) is type(twin)
    found = [check(model, twin)]
    for name in ("two", "one"):
        model.set_adapter(name)
        twin.set_adapter(name)
        found.append(check(model, twin))
    with model.disable_adapter():
        found.append(check(model, tiny(layers=1)))
    assert found[0] == found[2] != found[1]
    assert found[3] != found[0]
    model.merge_adapter()
    twin.merge_adapter()
    assert check(model, twin) == found[0]
    graphs = len(specpass.report(model).graphs)
    check(model, twin)
    assert len(specpass.report(model).graphs) == graphs


def test_report_and_restore_know_the_wrapper() -> None:
    model = compile_eager(adapted(), METHOD)
    run(model, prompt(60), 2)
    assert "1 sites rewritten" in str(specpass.report(model)) or "1 site" in str(specpass.report(model))
    assert specpass.restore(model) is model
    assert type(run(model, prompt(60), 2).cache).__name__ == "DynamicCache"
    with pytest.raises(UnsupportedCallError, match="not compiled"):
        specpass.report(model)
