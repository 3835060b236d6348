"""Calls that an earlier process traced: found by the same model and form, by no other, and never half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny
from torch import fx
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

import specpass
from specpass.backend.inputs import Inputs, Unfit
from specpass.backend.kept import NOTE, KeptCalls
from specpass.capture import stored
from specpass.parallel.shards import Ranks

METHOD = specpass.SnapKV(budget=24, window=8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own; regions run uncompiled, since C++ is not the point."""

    class Region:
        def __init__(self, graph: fx.GraphModule, *_: object) -> None:
            self.graph = graph

        def callable(self) -> Callable[..., object]:
            return self.graph.forward

    monkeypatch.setattr("specpass.lowering.inductor.Variants", Region)
    monkeypatch.setattr(stored, "graphs_dir", lambda: tmp_path / "graphs")
    usable = property(lambda self: self.backend.lowering == "inductor" and not self.backend.observers)
    monkeypatch.setattr(KeptCalls, "usable", usable)
    return tmp_path / "graphs"


def answer(model: torch.nn.Module, length: int = 50) -> tuple[list[int], list[bool], int]:
    """A model's answer as a new process gives it; which of its graphs were kept; how many Dynamo traced."""
    torch._dynamo.reset()
    counters.clear()
    if not hasattr(model, "_specpass"):
        specpass.compile(model, method=METHOD)
    out = model.generate(prompt(length), max_new_tokens=4, do_sample=False, pad_token_id=0)
    graphs = specpass.report(model).graphs
    return out[0, length:].tolist(), [NOTE in graph.notes for graph in graphs], counters["stats"]["unique_graphs"]


def test_the_next_process_does_not_trace(folder: Path) -> None:
    """Another length, weights of another seed: the same graphs; they answer as traced ones do."""
    model = tiny(seed=0, layers=1)
    written, kept, traced = answer(model)
    assert (kept, traced) == ([False, False], 2)
    assert len(list(folder.glob("*.call"))) == 2
    again = answer(tiny(seed=0, layers=1))
    assert again == (written, [True, True], 0)
    other, kept, traced = answer(tiny(seed=3, layers=1), 71)
    assert (kept, traced) == ([True, True], 0)
    exact = specpass.compile(tiny(seed=3, layers=1), method=METHOD, lowering="eager")
    assert other == exact.generate(prompt(71), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 71:].tolist()

    scaled = tiny(seed=0, layers=1)  # another model, other functions, another method's budget: not found
    scaled.model.layers[0].self_attn.scaling = 0.5
    assert answer(scaled)[1] == [False, False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "rotate_half", lambda x: -x)
        assert answer(tiny(seed=0, layers=1))[1] == [False, False]


def test_a_draft_and_its_proposals_are_found_too() -> None:
    """One call holds the draft that looks ahead; what proposes behind it, and what verifies, are calls of their own."""

    def spoken(itself: bool) -> tuple[list[int], list[bool], int]:
        torch._dynamo.reset()
        counters.clear()
        model = tiny(seed=0, layers=1)
        method = specpass.SpecKV(budget=24, window=8, lookahead=4)
        specpass.compile(model, draft=model if itself else tiny(seed=1, layers=1), method=method, speculate=2)
        out = model.generate(prompt(50), max_new_tokens=9, do_sample=False, pad_token_id=0)
        graphs = specpass.report(model).graphs
        return out[0, 50:].tolist(), [NOTE in graph.notes for graph in graphs], counters["stats"]["unique_graphs"]

    for itself in (False, True):
        written, kept, traced = spoken(itself)
        assert not any(kept)
        assert traced >= 2
        again, kept, traced = spoken(itself)
        assert (again, all(kept), traced) == (written, True, 0)


def test_a_lookahead_of_one_token_is_the_drafts_prefill_alone() -> None:
    """An answer of one token asks for no more; a draft's step that nobody calls was lost on the way to the disk."""
    for found in (False, True):
        torch._dynamo.reset()
        model = tiny(seed=0, layers=1)
        specpass.compile(model, draft=tiny(seed=1, layers=1), method=specpass.SpecKV(budget=24, window=8))
        model.generate(prompt(50), max_new_tokens=1, do_sample=False, pad_token_id=0)
        report = specpass.report(model)
        assert [NOTE in graph.notes for graph in report.graphs] == [found]
        assert not report.refusals


def test_a_model_that_changes_is_traced_anew() -> None:
    answer(tiny(seed=0, layers=1))
    model = tiny(seed=0, layers=1)
    before, kept, _ = answer(model)
    assert kept == [True, True]
    model.model.layers[0].self_attn.scaling = 0.5
    changed, kept, _ = answer(model)
    assert kept == [True, True, False, False]
    assert changed != before


def test_each_process_of_a_group_has_graphs_of_its_own() -> None:
    model = tiny(seed=0, layers=1)
    backend = specpass.Backend(None, METHOD, lowering="inductor")
    names = set()
    for ranks in (None, Ranks(None, "tp", 2, 0), Ranks(None, "tp", 2, 1), Ranks(None, "tp", 4, 1)):
        backend.ranks = ranks
        calls = KeptCalls(model, type(model).forward, backend)
        calls._name()
        assert calls.key is not None
        names.add(calls.key.name)
    assert len(names) == 4


def test_a_damaged_file_is_replaced(folder: Path) -> None:
    written, *_ = answer(tiny(seed=0, layers=1))
    for path in folder.glob("*.call"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read .* traced anew"):
        assert answer(tiny(seed=0, layers=1)) == (written, [False, False], 2)
    assert answer(tiny(seed=0, layers=1)) == (written, [True, True], 0)


def test_inputs_are_checked() -> None:
    inputs = Inputs.of([torch.zeros(2, 3), torch.zeros(3, 2).t()])
    inputs.check((torch.ones(2, 3), torch.ones(3, 2).t()), set())
    for wrong in (torch.ones(2, 4), torch.ones(2, 3).double(), torch.ones(3, 2).t(), torch.ones(6)):
        with pytest.raises(Unfit):
            inputs.check((wrong, torch.ones(3, 2).t()), set())
