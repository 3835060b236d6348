"""Examples of docs/using.md, as they stand there, on a tiny model without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import example
from support import compile_eager, run
from tiny import prompt, tiny

import specpass
from specpass.backend import direct


def test_a_document_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "no graphs, which take seconds")
    model = compile_eager(tiny(), specpass.SnapKV(budget=24, window=8))
    ids = prompt(9, seed=1)
    names = {
        "specpass": specpass,
        "model": model,
        "document_ids": prompt(60),
        "question": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    exec(example("using.md", "A document read once"), names)
    assert names["answer"].tolist() == run(model, torch.cat([prompt(60), ids], 1), new=64).tokens[0]


def test_turns_that_ask_about_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "no graphs, which take seconds")
    ids, method = prompt(60), specpass.SnapKV(budget=24, window=8)
    names = {
        **globals(),
        "target": tiny(),
        "draft": None,
        "method": method,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "question_ids": prompt(9, seed=1),
    }
    exec(example("using.md", "Turns that ask about other places"), names)
    whole = run(compile_eager(tiny(), method), names["turn"], new=64)
    assert names["out"].sequences[0, names["turn"].shape[1] :].tolist() == whole.tokens[0]
