"""lowering="inductor" computes what lowering="eager" computes, and compiles alike layers once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recorder import Recorder
from support import Run, check_answer, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.kernels.cpu import blocks, wide
from specpass.lowering import row_pieces
from specpass.observe import progress

C, W, L, LAYERS = 24, 8, 4, 3
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """The same pair, lowered by Inductor, with pieces of a few rows, and not at all."""
    draft = tiny(seed=1, layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_pieces, "CPU_PIECE", 20 * 96 * 4)
        yield (
            specpass.compile(tiny(layers=LAYERS), draft=draft, method=METHOD, lowering="inductor"),
            compile_eager(tiny(layers=LAYERS), METHOD, draft),
        )


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return padded([prompt(60, seed=1), prompt(33, seed=2)])


@pytest.fixture(scope="module")
def told() -> Recorder:
    """Who watches the first run of both."""
    return Recorder()


@pytest.fixture(scope="module")
def runs(models: tuple[Any, Any], batch: tuple[torch.Tensor, torch.Tensor], told: Recorder) -> list[Run]:
    with progress.watching(told):
        return [run(model, batch[0], 6, batch[1]) for model in models]


def test_inductor_equals_eager(runs: list[Run], batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    ours, theirs = runs
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.cache.lookahead_ids, theirs.cache.lookahead_ids)
    for row, mask in enumerate(batch[1].bool()):
        for a, b in zip(kept(ours.cache, row), kept(theirs.cache, row), strict=True):
            assert torch.equal(a, b)
        check_answer(ours, tiny(layers=LAYERS), batch[0][[row]][:, mask], kept(ours.cache, row), row)


def test_layers_are_one_region(models: tuple[Any, Any], runs: list[Run]) -> None:
    """All but the last (take_early.py) of a prompt's, which are three and two, and all of a step's: a kind each."""
    report = specpass.report(models[0])
    assert not report.refusals
    found = {record.kind: (record.regions, record.distinct_regions) for record in report.graphs}
    assert found == {"prefill": (LAYERS - 1 + 1 + 2, 3), "decode": (LAYERS, 1)}


def test_who_watches_is_told_of_layers_compiled_and_read(runs: list[Run], told: Recorder) -> None:
    assert all(task.over for task in told.tasks)
    layers = [(task.total, task.done) for task in told.tasks if task.path == ("compiling", "layers")]
    assert layers == [(3, 3), (1, 1)]  # the target's, the draft's in its prefill and in its step; the decode step's
    ours, theirs = [task for task in told.tasks if task.path == ("reading the prompt",)]
    assert ours.total == ours.done > LAYERS * 64 * 64  # weights of all layers, in the order in which they are read
    assert (theirs.total, theirs.done) == (None, 0)
    assert [task.path[0] for task in told.tasks if len(task.path) == 1] == 2 * [
        "compiling",
        "reading the prompt",
        "compiling",
    ]


def test_another_length_compiles_nothing(models: tuple[Any, Any], runs: list[Run]) -> None:
    ids, mask = padded([prompt(71, seed=3), prompt(C, seed=4)])
    graphs = len(specpass.report(models[0]).graphs)
    ours, theirs = (run(model, ids, 6, mask) for model in models)
    assert ours.tokens == theirs.tokens
    assert len(specpass.report(models[0]).graphs) == graphs
    assert not specpass.report(models[0]).notes  # no region's code took the first prompt's length for granted


def test_bfloat16_rounds_where_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused region that kept float32 between operators would differ from the model in three logits of four.

    Products are the model's here: in float32, where the CPU has no instructions, sums are in another order.
    """
    monkeypatch.setattr(wide, "multiplies", lambda dtype: True)
    torch._dynamo.reset()
    model, twin = (tiny(layers=2).to(torch.bfloat16) for _ in range(2))
    specpass.compile(model, method=specpass.SnapKV(budget=C, window=W), lowering="inductor")
    ids = prompt(C, seed=5)
    ours, theirs = (run(model_, ids, 4) for model_ in (model, twin))
    assert torch.equal(ours.logits[:, 0], theirs.logits[:, 0])  # the prefill, bit for bit
    assert ours.tokens == theirs.tokens


def test_a_prompt_reuses_the_memory_of_its_layers(
    models: tuple[Any, Any], runs: list[Run], batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a low limit for what is large: the same answer, from blocks that served more than once."""
    taken: list[int] = []
    view = blocks._view

    def counted(block: torch.Tensor, *where: Any) -> torch.Tensor:
        taken.append(block.data_ptr())
        return view(block, *where)

    monkeypatch.setattr(blocks, "LARGE", 1000)
    monkeypatch.setattr(blocks, "_view", counted)
    again = run(models[0], batch[0], 6, batch[1])
    assert again.tokens == runs[0].tokens
    assert torch.equal(again.logits, runs[0].logits)
    assert len(taken) > len(set(taken)) > 0
