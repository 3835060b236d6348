"""Weights that cannot be traced: quantised tensors, offloaded ones; the model is pruned the second way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hybrids import hybrid
from support import compile_eager, run
from tiny import prompt, tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

import specpass
from specpass.capture.devices import device_of
from specpass.capture.model import untraceable

W, C = 8, 24
COVERING, SNAP = specpass.SnapKV(budget=128, window=W), specpass.SnapKV(budget=C, window=W)
SPEC = specpass.SpecKV(budget=C, window=W, lookahead=4)
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}


def check(make: Callable[[], Any], reason: str) -> None:
    """Exact at a covering budget, pruned below it, and the report says why."""
    exact = compile_eager(make(), COVERING)
    assert run(exact, prompt(60)).tokens == run(make(), prompt(60)).tokens
    pruned = compile_eager(make(), SNAP)
    found = run(pruned, prompt(60))
    assert all((layer.positions >= 0).sum() == 2 * C for layer in found.cache.layers)
    assert reason in specpass.report(pruned).interpreted


def check_draft(draft: Any) -> None:
    """Its own forward writes what its generate() writes."""
    found = run(compile_eager(tiny(), SPEC, draft), prompt(60)).cache.lookahead_ids
    assert found.tolist() == draft.generate(prompt(60), max_new_tokens=4, do_sample=False)[:, 60:].tolist()


class Foreign(torch.Tensor):
    """A tensor of a class of its own."""


def test_what_cannot_be_traced() -> None:
    model = tiny()
    assert untraceable(model) == ""
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.as_subclass(Foreign), requires_grad=False)
    assert untraceable(model) == "lm_head.weight is a Foreign, which cannot be traced"
    model.lm_head.weight = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    assert untraceable(model) == "lm_head.weight is offloaded"


def torchao(**settings: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny(**WIDE, **settings)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def test_torchao() -> None:
    check(torchao, "q_proj.weight is a ")
    check_draft(torchao(seed=3))


def test_torchao_int4_through_graphs() -> None:
    """Its int4 linears for a CPU hold plain tensors; Int4WeightOnlyConfig has no form that a CPU runs (0.18)."""
    quantization = pytest.importorskip("torchao.quantization")

    def packed() -> Any:
        return quantization.Int8DynActInt4WeightQuantizer(groupsize=32).quantize(tiny(**WIDE))

    model = compile_eager(packed(), SNAP)
    assert run(model, prompt(C)).tokens == run(packed(), prompt(C)).tokens
    found = run(model, prompt(60))
    assert all((layer.positions >= 0).sum() == 2 * C for layer in found.cache.layers)
    assert not specpass.report(model).interpreted


@pytest.mark.parametrize("kind", ["int8", "nf4", "quanto"])
def test_quantised_by_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto" if kind == "quanto" else "bitsandbytes")
    config = {
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "quanto": lambda: QuantoConfig(weights="int8"),
    }[kind]
    tiny(**WIDE).save_pretrained(tmp_path)
    kwargs: dict[str, Any] = {} if kind == "quanto" else {"device_map": "cpu"}
    check(
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(), **kwargs).eval(),
        "q_proj.weight is a ",
    )


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded(tied: bool) -> None:
    accelerate = pytest.importorskip("accelerate")

    def offloaded(**settings: Any) -> Any:
        model = tiny(tie_word_embeddings=tied, **settings)
        accelerate.cpu_offload(model, torch.device("cpu"))
        return model

    assert device_of(offloaded()) == torch.device("cpu")
    check(offloaded, "is offloaded")
    check_draft(offloaded(seed=3))


def test_half_precision_through_graphs() -> None:
    model = compile_eager(tiny().half(), SNAP)
    found = run(model, prompt(60))
    assert all(layer.keys.dtype == torch.float16 for layer in found.cache.layers)
    assert not specpass.report(model).interpreted


def test_a_draft_of_another_dtype_through_graphs() -> None:
    model = compile_eager(tiny(), SPEC, tiny(seed=3).bfloat16())
    found = run(model, prompt(60))
    assert found.cache.lookahead_ids.shape == (1, 4)
    assert [graph.kind for graph in specpass.report(model).graphs] == ["prefill", "decode"]


def test_gguf_left_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves blocks packed in a few architectures, all of them with states."""
    modules = pytest.importorskip("transformers.integrations.gguf.utils")
    monkeypatch.setattr(modules, "MAX_GEMV_ROWS", 0)  # its kernel comes from the hub
    kind = gguf.GGMLQuantizationType.Q8_0

    def packed(**settings: Any) -> Any:
        model = hybrid("lfm2", **settings)
        for layer in model.model.layers:
            for name, linear in list(layer.named_modules()):
                if isinstance(linear, torch.nn.Linear):
                    parent, _, own = name.rpartition(".")
                    new = modules.GgufLinear(linear.in_features, linear.out_features, int(kind))
                    blocks = gguf.quants.quantize(linear.weight.numpy(), kind)
                    new.weight.data = torch.from_numpy(blocks.view("uint8"))
                    setattr(layer.get_submodule(parent), own, new)
        return model

    exact = compile_eager(packed(), COVERING)
    assert run(exact, prompt(60)).tokens == run(packed(), prompt(60)).tokens
    found = run(compile_eager(packed(), SPEC, packed(seed=3)), prompt(60))
    assert all((layer.positions >= 0).sum() == 2 * C for layer in found.cache.budgeted)
