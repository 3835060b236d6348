"""Linear layers of few rows by weights in 8 bits: as near to float64 as torch's of the same weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import specpass.ops  # noqa: F401  (says where libraries are kept)
from specpass.dialect.define import SPEC
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear8 import quantized, rows8, serves8


@pytest.fixture(autouse=True)
def library() -> None:
    if isinstance(found := rows8(), Unbuilt):
        pytest.skip(str(found))


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).bfloat16()


@pytest.mark.parametrize("inner", [64, 192, 896])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_as_near_as_torch(inner: int, count: int) -> None:
    """Last blocks that overlap, groups of columns that are not whole, one number larger than all others, zeros."""
    x, weights = normal(1, count, inner), [normal(size, inner) for size in (16, 17, 100)]
    x[0, 0, 3], x[0, -1, 64:] = 300, 0
    weights[1][2] = 0
    biases = [normal(len(weight)) if len(weight) % 2 == 0 else None for weight in weights]
    parts = [quantized(weight) for weight in weights]
    outs = SPEC.linear_rows8(x, [part[0] for part in parts], [part[1] for part in parts], biases)
    for out, (numbers, scale), bias in zip(outs, parts, biases, strict=True):
        whole = numbers.double() * scale.double()[:, None]
        exact = F.linear(x.double(), whole, None if bias is None else bias.double())
        torchs = F.linear(x, whole.bfloat16(), bias)
        assert (out.shape, out.dtype) == (exact.shape, torch.bfloat16)
        assert (out.double() - exact).abs().max() <= 1.5 * (torchs.double() - exact).abs().max()


def test_nearest_of_255_values() -> None:
    weight = normal(100, 128)
    numbers, scale = quantized(weight)
    assert (numbers.dtype, scale.dtype, int(numbers.min())) == (torch.int8, torch.float32, -127)
    assert ((numbers * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()
    assert torch.equal(numbers.abs().amax(1), torch.full((100,), 127, dtype=torch.int8))


def test_what_is_no_number_stays_in_its_row() -> None:
    x, (numbers, scale) = normal(3, 64), quantized(normal(48, 64))
    x[0, 5], x[1, 7] = math.inf, math.nan
    (out,) = SPEC.linear_rows8(x, [numbers], [scale], [None])
    assert not out[:2].isfinite().any()
    assert out[2].isfinite().all()


def test_what_is_served() -> None:
    assert serves8(normal(16, 64), normal(16))
    for weight in (normal(15, 64), normal(16, 96), normal(16, 64).float(), normal(2, 16, 64)):
        assert not serves8(weight, None)
    assert not serves8(normal(16, 64), torch.zeros(16))
