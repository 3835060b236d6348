"""A CPU's own importance, held to the reference on the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import specpass.ops  # noqa: F401  (says where libraries are kept)
from specpass.dialect.define import SPEC
from specpass.kernels.cpu import importance as own
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.isa import AMX, AVX512
from specpass.kernels.cpu.tiles import prepared
from specpass.kernels.importance import reference

B, H, K, T = 2, 6, 2, 173
ROWS = torch.tensor([[100, 101, 102, 150, -1], [-1, 0, 1, 2, 172]])
LENGTHS = torch.tensor([110, 173])


def states(dim: int, rows: int = ROWS.shape[1]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    query = 3 * torch.randn(B, rows, H, dim, generator=generator)
    key = torch.randn(B, T, K, dim, generator=generator)
    return query.bfloat16().transpose(1, 2), key.bfloat16().transpose(1, 2)


@pytest.fixture(autouse=True, params=[AMX, AVX512], ids=lambda isa: isa.title)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to multiply that this machine has, not only the one that is taken."""
    found = prepared("importance", request.param)
    if isinstance(found, Unbuilt):
        pytest.skip(str(found))
    monkeypatch.setattr(own, "library", lambda name: found)


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_scores(dim: int, reduce: str, weighted: bool, given: bool) -> None:
    query, key = states(dim)
    scale, weights = dim**-0.5, torch.linspace(0, 1, ROWS.shape[1]) if weighted else None
    logits = query.double() @ key.double().repeat_interleave(H // K, 1).mT * scale
    hidden = torch.arange(T) > ROWS[:, None, :, None]
    lse = logits.masked_fill(hidden, float("-inf")).logsumexp(-1).float() if given else None
    operands = (ROWS, LENGTHS, 7, scale, reduce, weights, lse)
    expected = reference.importance(query.float(), key.float(), *operands)
    found = SPEC.importance(query, key, *operands)
    assert (found.dtype, found.shape) == (torch.float32, (B, K, T))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=2e-5)
    assert torch.equal(found == 0, expected == 0)


def test_more_rows_than_a_strip() -> None:
    query, key = states(64, 70)
    rows = torch.arange(100, 170).expand(B, -1)
    operands = (rows, LENGTHS, 0, 0.125, "max")
    found = SPEC.importance(query, key, *operands)
    torch.testing.assert_close(found, reference.importance(query, key, *operands), atol=1e-7, rtol=2e-5)


def test_what_changes_the_logits_is_the_references() -> None:
    query, key = states(32)
    operands = (ROWS, LENGTHS, 7, 0.2, "max", None, None, 3.0, torch.randn(H), None)
    assert torch.equal(SPEC.importance(query, key, *operands), reference.importance(query, key, *operands))
