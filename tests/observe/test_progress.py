"""Tasks, who watches them, and how they look on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
import torch
from recorder import Recorder
from rich.console import Console
from tiny import prompt, tiny

from specpass.observe import display as shown
from specpass.observe import progress
from specpass.observe.layers import decoder_layers, reading_by_layers


def test_nobody_is_told_unless_asked() -> None:
    seen = Recorder()
    with progress.task("unseen", 2):
        progress.advance()
    with progress.watching(seen):
        with progress.task("seen", 2):
            progress.advance(2)
        progress.leave()
        with progress.task("behind"):
            progress.advance()
    assert not progress.watched()
    assert [(task.path, task.total, task.done, task.over) for task in seen.tasks] == [(("seen",), 2, 2, True)]


def test_parts_of_another_task_are_none_of_the_one_that_is_open() -> None:
    """Layers run for steps too, with or without a task of somebody else's around them."""
    seen = Recorder()
    with progress.watching(seen), progress.task("both", 2):
        progress.advance(1000, progress.READING)
        with progress.task(progress.READING, 3):
            progress.advance(2, progress.READING)
        progress.advance(of="both")
    assert [(task.path[-1], task.done) for task in seen.tasks] == [("both", 1), (progress.READING, 2)]


def test_a_task_that_fails_is_over() -> None:
    seen = Recorder()
    with pytest.raises(ZeroDivisionError), progress.watching(seen), progress.task("outer"), progress.task("inner", 3):
        raise ZeroDivisionError
    assert [task.path for task in seen.tasks if task.over] == [("outer",), ("outer", "inner")]


def test_a_models_own_forward_is_told_by_layers() -> None:
    model, seen = tiny(layers=3), Recorder()
    with progress.watching(seen), reading_by_layers(model), torch.no_grad():
        model.generate(prompt(20), max_new_tokens=3, do_sample=False)
    assert [(task.path, task.total, task.done, task.over) for task in seen.tasks] == [
        (("reading the prompt",), 3, 3, True)
    ]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model))


def test_a_forward_that_fails_leaves_no_hook() -> None:
    model, seen = tiny(layers=2), Recorder()
    with pytest.raises(IndexError), progress.watching(seen), reading_by_layers(model):
        model(torch.tensor([[10**6]]))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model))


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(shown.time, "monotonic", lambda: now)
    out = io.StringIO()
    lines = shown.display(Console(file=out, width=200))
    with progress.watching(lines), progress.task("SpecKV 128 (1 of 2)"):
        with progress.task("quick", 2):
            progress.advance()
        now = 6.0
        with progress.task("layers", 4):
            now = 8.0
            progress.advance()
            now = 12.0
            progress.advance()
    assert out.getvalue().splitlines() == ["SpecKV 128 (1 of 2): layers", "SpecKV 128 (1 of 2): layers, 50%, 6 s left"]


def test_a_terminal_shows_one_bar_and_keeps_none() -> None:
    out = io.StringIO()
    bars = shown.display(Console(file=out, width=100, force_terminal=True, force_interactive=True))
    assert isinstance(bars, shown.Bars)
    with progress.watching(bars), progress.task("compiling"):
        with progress.task("layers", 4):
            progress.advance()
            assert bars.bars is not None
            bars.bars.refresh()
            visible = [task.description for task in bars.bars.tasks if task.visible]
            assert visible == ["compiling: layers"]
        assert [task.description for task in bars.bars.tasks if task.visible] == ["compiling"]
    assert bars.bars is None
    assert "compiling: layers" in out.getvalue()
    assert "25 %" in out.getvalue()
    behind = out.getvalue().rpartition("\x1b[2K")[2]  # what was written when the line was last erased
    assert not behind.replace("\x1b[?25h", "").strip()
