"""reconstruction: by the definition, one column taken away after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specpass.dialect.define import SPEC
from specpass.testing.attention import moves

B, K, G, R, T, D, W = 2, 2, 3, 5, 40, 8, 4
LENGTHS = torch.tensor([T - 2, T - 12])
ROWS = LENGTHS[:, None] + torch.arange(-3, 2)
SCALE = 0.4


def operands(seed: int = 0, large: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return large * torch.randn(B, K * G, R, D), torch.randn(B, K, T, D), torch.randn(B, K, T, D + 1)


def expected(p: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, reduce: str) -> torch.Tensor:
    """[B, K, T] of p [B, K, G, R, T], in rows that are not left out."""
    found = []
    for row in range(B):
        live = p[row, :, :, rows[row] >= 0].flatten(1, 2)
        each = moves(live, value[row])
        scores = each.amax(1) if reduce == "max" else each.mean(1)
        found.append(scores.masked_fill(torch.arange(T) >= LENGTHS[row] - W, 0.0))
    return torch.stack(found)


def logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bkgrd,bktd->bkgrt", query.unflatten(1, (K, G)), key) * SCALE


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_as_defined(reduce: str) -> None:
    query, key, value = operands()
    rows = ROWS.clone()
    rows[1, 4] = -1  # behind an end-of-sequence token
    hidden = (torch.arange(T) > rows[:, :, None])[:, None, None]
    p = logits(query, key).masked_fill(hidden, float("-inf")).softmax(-1)
    found = SPEC.reconstruction(query, key, value, rows, LENGTHS, W, SCALE, reduce)
    torch.testing.assert_close(found, expected(p, value, rows, reduce), atol=1e-5, rtol=1e-4)


def test_what_models_do_to_logits() -> None:
    query, key, value = operands(1)
    sinks, bias = torch.randn(K * G), torch.randn(1, K * G, T)
    capped = 2.0 * torch.tanh(logits(query, key) / 2.0) + bias.unflatten(1, (K, G))[:, :, :, None]
    capped = capped.masked_fill((torch.arange(T) > ROWS[:, :, None])[:, None, None], float("-inf"))
    column = sinks.view(1, K, G, 1, 1).expand(B, -1, -1, R, -1)
    p = torch.cat([capped, column], -1).softmax(-1)[..., :-1]
    found = SPEC.reconstruction(query, key, value, ROWS, LENGTHS, W, SCALE, "max", 0, 2.0, sinks, bias)
    torch.testing.assert_close(found, expected(p, value, ROWS, "max"), atol=1e-5, rtol=1e-4)


def test_futures_do_not_read_each_other() -> None:
    """As one future alone, where the other one's keys and values are anything."""
    query, key, value = operands(2)
    lengths = torch.tensor([T - 4, T - 10])
    rows = lengths[:, None] + torch.arange(-1, 4)  # one of the window, two of each of two futures
    both = SPEC.reconstruction(query, key, value, rows, lengths, W, SCALE, "max", 2)
    alone = []
    for future in (0, 1):
        taken = [0, 1 + 2 * future, 2 + 2 * future]
        columns = torch.arange(T).expand(B, -1).clone()
        for row in range(B):
            begin = int(lengths[row])
            columns[row, begin : begin + 2] = torch.tensor([begin + 2 * future, begin + 2 * future + 1])
        own = [each.gather(2, columns[:, None, :, None].expand(-1, K, -1, each.shape[3])) for each in (key, value)]
        at = rows[:, :3]
        alone.append(SPEC.reconstruction(query[:, :, taken], *own, at, lengths, W, SCALE, "max"))
    torch.testing.assert_close(both, torch.maximum(*alone))


@pytest.mark.parametrize("large", [30.0, 300.0])
def test_rounding_is_bounded_where_a_row_reads_one_column(large: float) -> None:
    """1 - p is rounding there, and no score says more than its values can."""
    query, key, value = operands(3, large)
    found = SPEC.reconstruction(query, key, value, ROWS, LENGTHS, W, SCALE, "max")
    assert found.isfinite().all()
    norms = value.norm(dim=-1)
    assert (found <= norms + norms.amax(-1, keepdim=True) + 1e-5).all()


def test_memory_is_that_of_one_kv_head(monkeypatch: Any) -> None:
    """[B, G, R, T] at a time, and no [B, H, R, T]."""
    sizes = []
    softmax = torch.softmax

    def counted(logits: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(logits.numel())
        return softmax(logits, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", counted)
    SPEC.reconstruction(*operands(4), ROWS, LENGTHS, W, SCALE, "max")
    assert sizes == K * [B * G * R * T]
