"""What no whole graph can be had of: pruned the second way, or exact, with one reason either way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hybrids import hybrid
from support import compile_eager, run
from tiny import prompt, tiny
from torch._inductor.exc import InvalidCxxCompiler

import specpass
from specpass.backend import compile as backend
from specpass.lowering import inductor

W, C = 8, 24
COVERING, SNAP = specpass.SnapKV(budget=128, window=W), specpass.SnapKV(budget=C, window=W)
SPEC = specpass.SpecKV(budget=C, window=W, lookahead=4)


def broken(**settings: Any) -> Any:
    """A decoder whose second layer breaks the graph."""
    model = tiny(**settings)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    return model


def with_attention(model: Any, kind: str) -> Any:
    model.set_attn_implementation(kind)
    return model


def text_of(model: Any) -> str:
    return str(specpass.report(model))


def test_graph_break() -> None:
    exact = compile_eager(broken(), COVERING)
    assert run(exact, prompt(60)).tokens == run(tiny(), prompt(60)).tokens
    pruned, graphs = compile_eager(broken(), SNAP), compile_eager(tiny(), SNAP)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "specpass")  # a piece of the graph is no call without a BudgetCache
        ours = run(pruned, prompt(60))
    theirs = run(graphs, prompt(60))
    assert ours.tokens == theirs.tokens
    for layer, own in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert torch.equal(layer.positions, own.positions)
    assert "interpreted: no whole graph could be made (PartialGraphError: " in text_of(pruned)
    assert specpass.report(pruned).foreign == 0


def test_no_compiler_is_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's search for one prints nothing of its own, and what it raises says what to do."""

    def search() -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(inductor, "valid_vec_isa_list", search)
    inductor.compiler_probe.cache_clear()
    inductor.compiler_probe().join()
    inductor.compiler_probe.cache_clear()
    model = specpass.compile(tiny(layers=1), method=SNAP)
    monkeypatch.setattr(backend, "lower", lambda *_, **__: search())
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found: install one, name it in CXX"):
        assert run(model, prompt(60), 2).cache.layers[0].positions.shape[-1] == C


def test_decode_alone_breaks() -> None:
    """A graph read the prompt; what goes on from it cannot be one, and goes on from the same storage."""
    target = tiny()

    def hook(module: Any, args: Any) -> None:
        if args[0].shape[1] == 1:
            torch._dynamo.graph_break()

    target.model.layers[1].register_forward_pre_hook(hook)
    model, graphs = compile_eager(target, SNAP), compile_eager(tiny(), SNAP)
    assert run(model, prompt(60)).tokens == run(graphs, prompt(60)).tokens
    report = specpass.report(model)
    assert [graph.kind for graph in report.graphs] == ["prefill"]
    assert report.interpreted


@pytest.mark.parametrize("draft", [lambda: hybrid("lfm2"), broken], ids=["recurrent", "broken"])
def test_drafts_of_every_kind(draft: Callable[[], Any]) -> None:
    model = compile_eager(hybrid("lfm2"), SPEC, draft())
    ids = run(model, prompt(60)).cache.lookahead_ids
    theirs = draft().generate(prompt(60), max_new_tokens=4, do_sample=False)[:, 60:]
    assert torch.equal(ids, theirs)


def test_uncaptured_draft_of_a_target_with_graphs() -> None:
    model = compile_eager(tiny(), SPEC, hybrid("lfm2"))
    found = run(model, prompt(60))
    assert all((layer.positions >= 0).sum() == 2 * C for layer in found.cache.layers)
    assert "interpreted: the draft cannot be captured: it has layers with a state" in text_of(model)


def test_specpc_needs_a_captured_draft() -> None:
    method = specpass.SpecPC(budget=30, window=W)
    model = compile_eager(hybrid("lfm2"), method, hybrid("lfm2"))
    found = run(model, prompt(60))
    assert found.tokens == run(hybrid("lfm2"), prompt(60)).tokens
    assert "refused: the draft cannot be captured: it has layers with a state" in text_of(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_attention(hybrid("lfm2"), "eager"), "no scaled_dot_product_attention was seen"),
        (lambda: with_attention(tiny(), "flex_attention"), "load the model with attn_implementation='sdpa'"),
    ],
    ids=["eager", "flex"],
)
def test_attention_that_cannot_be_seen(make: Callable[[], Any], reason: str) -> None:
    ids = prompt(128)  # torch's flex kernel for AVX2 reads beyond a prompt that fills no block (torch 2.13)
    model = compile_eager(make(), SNAP)
    found = run(model, ids, new=1)  # flex attention compiles anew for each length
    assert found.tokens == run(make(), ids, new=1).tokens
    assert all(layer.exact for layer in found.cache.budgeted)
    assert reason in text_of(model)


def test_nothing_to_prune() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    expected = run(model, prompt(40)).tokens
    compile_eager(model, SNAP)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="specpass")
        assert run(model, prompt(40)).tokens == expected
    assert "refused: no layer of the model holds keys and values" in text_of(model)
    with pytest.raises(specpass.errors.UnsupportedCallError, match="holds keys and values"):
        specpass.BudgetCache(model.config, SNAP)
