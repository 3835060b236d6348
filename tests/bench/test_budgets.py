"""What bench.budgets says of its records, and the controls that it compares with."""

from __future__ import annotations

from typing import Any

import torch

from bench.budgets import ENGINES, KeyDiff, Random, arguments, summarise
from bench.scores import SCORES, probabilities
from specpass.kernels.importance.reference import importance


def record(method: str, budget: int | None, task: str, score: float, seed: int = 0) -> dict[str, Any]:
    return {"method": method, "budget": budget, "task": task, "length": 1024, "seed": seed, "score": score}


def test_scores_over_those_of_full_kv() -> None:
    records = [
        *(record("full", None, task, score) for task, score in (("vt", 0.8), ("niah", 1.0), ("code", 0.0))),
        *(record("speckv", 64, task, score) for task, score in (("vt", 0.4), ("niah", 1.0), ("code", 0.0))),
    ]
    full, ours = summarise(records)
    assert full["tasks_of_full"] == {"vt": 1.0, "niah": 1.0, "code": None}
    assert ours["tasks_of_full"] == {"vt": 0.5, "niah": 1.0, "code": None}
    assert ours["retention"] == round(1.4 / 1.8, 4)


def test_every_engine_is_a_method(monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["budgets", "--engines", "oracle"])
    given = arguments()
    assert given.engines == ("full", "oracle")
    for make in ENGINES.values():
        assert make(given, 64).budget == 64


def test_controls_look_at_no_question() -> None:
    key = torch.ones(1, 2, 6, 4)
    key[:, :, 3] = -1
    lengths, none = torch.tensor([6]), torch.empty(0)
    scores = KeyDiff(budget=8, window=4).score(none, key, key, none, lengths, 1.0)
    assert scores.shape == (1, 2, 6)
    assert scores.argmax(-1).tolist() == [[3, 3]]
    first, again = (Random(budget=8, window=4).score(none, key, key, none, lengths, 1.0) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_other_scores_by_their_definitions() -> None:
    """One row at a time."""
    torch.manual_seed(0)
    batch, heads, kv_heads, columns, dim, window = 2, 4, 2, 12, 8, 3
    query = torch.randn(batch, heads, 4, dim)
    key, value = (torch.randn(batch, kv_heads, columns, dim) for _ in range(2))
    rows, lengths = torch.tensor([[8, 9, 10, 11], [-1, 7, 8, 9]]), torch.tensor([11, 9])
    asked = (query, key, value, rows, lengths, 0.5)
    found = {name: cls(budget=9, window=window).score(*asked) for name, cls in SCORES.items()}
    p = probabilities(query, key, rows, 0.5)
    most = importance(query, key, rows, lengths, window, 0.5, "max")
    for row, length in enumerate(lengths.tolist()):
        kept = slice(0, length - window)
        torch.testing.assert_close(p[row].amax((1, 2))[:, kept], most[row][:, kept])
        torch.testing.assert_close(found["mean rows"][row], p[row].mean(2).amax(1))
        risk = most[row][:, kept]
        risk = risk.maximum(risk.mean(-1, keepdim=True)) * value[row][:, kept].norm(dim=-1)
        torch.testing.assert_close(found["defensive"][row][:, kept], risk)
        inner = p[row][..., 4 : length - window]
        live = inner[:, :, (rows[row] >= 0)]
        due = (live / live.sum(-1, keepdim=True)).amax((1, 2))
        torch.testing.assert_close(found["without sinks"][row][:, 4 : length - window], due)
