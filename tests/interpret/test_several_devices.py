"""A model spread over devices (device_map) by accelerate's own hooks, on twin devices: see helpers/twin_devices.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.backend import captured
from specpass.benchmarks.coverage.tiny import tiny_model
from specpass.interpret import masks

pytest.importorskip("accelerate")
from twin_devices import FIRST, SECOND, spread, twin_devices

W, C, L = 8, 24, 4
SNAP, SPEC = specpass.SnapKV(budget=C, window=W), specpass.SpecKV(budget=C, window=W, lookahead=L)
BOTH = specpass.SpecKVPC(budget=16, window=W, lookahead=L, prompt_budget=C, prompt_window=W)
GIVEN = specpass.SpecKV(budget=C, window=W, lookahead_ids=prompt(L, batch=2, seed=7))
METHODS = (
    SNAP,
    SPEC,
    BOTH,
    BOTH.prompt,
    specpass.PyramidKV(budget=C, window=W),
    specpass.StreamingLLM(budget=C, sinks=4),
)
MIXED = {"layers": 3, "layer_types": ("full_attention", "sliding_attention", "full_attention")}
IDS, MASK = padded([prompt(60, seed=3), prompt(41, seed=4)])


@dataclasses.dataclass(frozen=True)
class Talk:
    """What two turns gave: tokens, and what the first one kept, on the CPU."""

    tokens: list[Any]
    kept: list[Tensor]
    devices: list[str]


def talk(model: Any, ids: Tensor, mask: Tensor, method: Any, device: str = "cpu", **options: Any) -> Talk:
    cache = specpass.BudgetCache(model.config, method, 16, **options)
    ids, mask = ids.to(device), mask.to(device)
    first = run(model, ids, new=4, mask=mask, past_key_values=cache)
    kept = [layer.positions.cpu().clone() for layer in cache.budgeted]
    places = [str(layer.key_buffer.device) for layer in cache.budgeted]
    new = prompt(5, batch=len(ids), seed=9)
    ids = torch.cat([ids, torch.tensor(first.tokens).to(device), new.to(device)], 1)
    mask = torch.cat([mask, torch.ones(len(ids), 9, dtype=torch.int64).to(device)], 1)
    second = run(model, ids, new=3, mask=mask, past_key_values=cache)
    return Talk([first.tokens, second.tokens], kept, places)


def same(ours: Talk, theirs: Talk) -> None:
    assert ours.tokens == theirs.tokens
    for own, other in zip(ours.kept, theirs.kept, strict=True):
        assert torch.equal(own, other)


def test_twins_do_not_mix() -> None:
    with twin_devices() as copies:
        first, second = torch.ones(2, device=FIRST), torch.tensor([1.0, 2.0], device=SECOND)
        for other in (second, torch.ones(2), second.sum()):
            with pytest.raises(RuntimeError, match="operands on"):
                first + other
        assert (first + second.to(FIRST) + torch.tensor(1.0)).tolist() == [3.0, 4.0]
        assert [copy[:2] for copy in copies] == [(torch.device("cpu"), second.device), (second.device, first.device)]


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny(seed=5)


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """A draft's graphs take seconds, and are the same whatever the target is."""
    known: dict[Any, Any] = {}
    own = captured.capture

    def capture(draft: Any, method: Any, goes_on: bool = False) -> Any:
        key = (draft, method.prompt, goes_on)
        if key not in known:
            known[key] = own(draft, method, goes_on)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "capture", capture)
        yield


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in METHODS), ("qwen2", GIVEN), ("gemma3", GIVEN)],
    ids=lambda given: getattr(given, "name", given),
)
def test_as_on_one_device(family: str, method: Any, draft: Any) -> None:
    """Prompts with padding, steps, a second turn; the draft lies on the CPU, which is none of the target's devices."""
    shape: dict[str, Any] = MIXED if family == "gemma3" else {"layers": 3}
    writes = draft if method.needs_draft else None
    theirs = talk(second_way(tiny(family, **shape), method, writes), IDS, MASK, method)
    with twin_devices():
        model = compile_eager(spread(tiny(family, **shape)), method, writes)
        ours = talk(model, IDS, MASK, method, FIRST)
    same(ours, theirs)
    assert ours.devices == [FIRST, SECOND, SECOND]
    assert not specpass.report(model).refusals


def test_what_layers_share_is_copied_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five layers on the second device none brings another copy, and one mask is read once for all."""
    read: list[Any] = []
    monkeypatch.setattr(masks, "difference", lambda *args, own=masks.difference: read.append(args[0]) or own(*args))
    with twin_devices() as copies, torch.no_grad():
        model = compile_eager(spread(tiny(layers=6)), GIVEN)
        ids, mask = IDS.to(FIRST), MASK.to(FIRST)
        copies.clear()
        cache = specpass.BudgetCache(model.config, GIVEN, 8)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    there = [copy[2:] for copy in copies if copy[1] == torch.device(SECOND)]
    batch, size = IDS.shape
    assert there.count((torch.int64, (batch,))) == 1, "lengths"
    assert there.count((torch.int64, (batch, W + L))) == 1, "rows that score"
    assert there.count((torch.bool, (batch, size))) == 1, "padding"
    assert len(read) == 1


def test_fewer_bits_and_bounded_answers() -> None:
    options = {"cache_bits": 8, "generated": 8}
    theirs = talk(second_way(tiny(layers=3), SNAP), IDS, MASK, SNAP, **options)
    with twin_devices():
        same(talk(compile_eager(spread(tiny(layers=3)), SNAP), IDS, MASK, SNAP, FIRST, **options), theirs)


@pytest.mark.parametrize("where", ["second", "spread"])
def test_drafts_elsewhere(where: str, draft: Any) -> None:
    """On the target's second device, or spread itself; either has no graphs here, and its own forward writes."""
    theirs = talk(second_way(tiny(layers=3), SPEC, draft), IDS, MASK, SPEC)
    with twin_devices():
        other = spread(tiny(seed=5)) if where == "spread" else tiny(seed=5).to(SECOND)
        model = compile_eager(spread(tiny(layers=3)), SPEC, other)
        same(talk(model, IDS, MASK, SPEC, FIRST), theirs)
    parts = {FIRST: ["embeddings", "layers 0"], SECOND: ["layers 1 .. 2", "head"]}
    if where == "second":
        parts[SECOND] += ["the draft's embeddings", "the draft's layers 0 .. 1", "the draft's head"]
    else:
        parts[FIRST] += ["the draft's embeddings", "the draft's layers 0"]
        parts[SECOND] += ["the draft's layers 1", "the draft's head"]
    report = specpass.report(model)
    assert report.data()["devices"] == parts
    assert f"interpreted: it is spread over {FIRST} and {SECOND}; " in str(report)
    assert f"  {FIRST}: {', '.join(parts[FIRST])}\n" in str(report)


def test_a_target_that_is_its_own_draft() -> None:
    written = run(tiny(layers=3), IDS[:1], new=L).tokens
    with twin_devices():
        target = spread(tiny(layers=3))
        found = run(compile_eager(target, SPEC, target), IDS[:1].to(FIRST))
        assert found.cache.lookahead_ids.tolist() == written


def test_a_spread_draft_of_a_target_that_has_graphs(draft: Any) -> None:
    """They would be joined by the draft's, of which there are none."""
    other = tiny(seed=5)
    for layer, device in zip(other.model.layers, ("cpu", FIRST), strict=True):
        layer._hf_hook = SimpleNamespace(execution_device=device)
    model = compile_eager(tiny(layers=3), SPEC, other)
    same(talk(model, IDS, MASK, SPEC), talk(second_way(tiny(layers=3), SPEC, draft), IDS, MASK, SPEC))
    reason = f"the draft cannot be captured: it is spread over cpu and {FIRST}"
    assert specpass.report(model).interpreted == reason


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_beside_two_devices(where: str, tmp_path: Path) -> None:
    theirs = talk(second_way(tiny(layers=3), SNAP), IDS, MASK, SNAP)
    with twin_devices():
        model = spread(tiny(layers=3), places={"model.layers.0": where}, folder=tmp_path)
        ours = talk(compile_eager(model, SNAP), IDS, MASK, SNAP, FIRST)
    same(ours, theirs)
    assert ours.devices == [FIRST, SECOND, SECOND]


def test_layers_that_read_keys_from_another_device() -> None:
    """Gemma 3n's last layers have no keys of their own: the model runs exactly, and the report says why."""
    theirs = run(tiny_model("gemma3n_text"), IDS, mask=MASK).tokens
    with twin_devices():
        model = compile_eager(spread(tiny_model("gemma3n_text"), first=2), SNAP)
        assert run(model, IDS.to(FIRST), mask=MASK.to(FIRST)).tokens == theirs
    assert any("a layer on another device reads layer" in reason for reason in specpass.report(model).refusals)


def test_a_document_lies_with_its_layers() -> None:
    """Questions of different lengths stand behind it."""

    def answers(model: Any, device: str) -> tuple[Any, list[str]]:
        prefix = specpass.read(model, prompt(50, seed=6))
        ids, mask = (part.to(device) for part in padded([prompt(12, seed=7), prompt(7, seed=8)]))
        return run(model, ids, mask=mask, prefix=prefix).tokens, [str(key.device) for key, _ in prefix.layers.values()]

    theirs, _ = answers(second_way(tiny(layers=3), SNAP), "cpu")
    with twin_devices():
        ours = answers(compile_eager(spread(tiny(layers=3)), SNAP), FIRST)
    assert ours == (theirs, [FIRST, SECOND, SECOND])


def test_turns_that_choose_anew(draft: Any) -> None:
    """What is dropped lies on the host, whichever device it came from, and so does what the draft has read."""

    def answers(model: Any, device: str) -> list[Any]:
        cache = specpass.BudgetCache(model.config, SPEC, 16, dropped="host")
        first = run(model, prompt(40).to(device), new=3, past_key_values=cache).tokens
        ids = torch.cat([prompt(40), torch.tensor(first), prompt(5, seed=9)], 1).to(device)
        return [first, run(model, ids, new=3, past_key_values=cache).tokens]

    theirs = answers(second_way(tiny(layers=3), SPEC, draft, dropped="host"), "cpu")
    with twin_devices():
        assert answers(compile_eager(spread(tiny(layers=3)), SPEC, draft, dropped="host"), FIRST) == theirs


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (dataclasses.replace(SNAP, spread="global"), errors.SpreadError, "spread='uniform'"),
        (dataclasses.replace(SNAP, spread="heads"), errors.SpreadError, "spread='uniform'"),
        (dataclasses.replace(SNAP, budget="auto"), errors.BudgetError, "budget=1024"),
        (dataclasses.replace(SPEC, futures=2), errors.FuturesError, "leave futures out"),
    ],
)
def test_what_graphs_alone_can_do(method: Any, error: type[Exception], text: str, draft: Any) -> None:
    with twin_devices():
        model = compile_eager(spread(tiny()), method, draft)
        with pytest.raises(error, match=f"it is spread over {FIRST} and {SECOND}.*{text}"):
            run(model, prompt(60).to(FIRST))


def test_drafts_whose_attention_is_read() -> None:
    with twin_devices():
        draft = spread(tiny(seed=5))
        with pytest.raises(errors.SeveralDevicesError, match=r"SpecPC reads its attention.*'lazy:0'}, or use SpecKV"):
            compile_eager(tiny(), BOTH.prompt, draft)
        with pytest.raises(errors.SeveralDevicesError, match=r"the draft is spread over.*: load it with"):
            specpass.PromptCompressor(draft, BOTH.prompt)
