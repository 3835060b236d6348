"""Linear layers of few rows in C++: as near to float64 as torch's, for all sizes that are served."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import specpass.ops  # noqa: F401  (says where libraries are kept)
from specpass.dialect.define import SPEC
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.isa import AMX, AVX512
from specpass.kernels.cpu.linear import Rows, multiply, prepared, serves

LIBRARIES = {"amx": (AMX, 32), "dot": (AVX512, 8)}


@pytest.fixture(params=LIBRARIES)
def rows(request: pytest.FixtureRequest) -> Rows:
    isa, most = LIBRARIES[request.param]
    found = prepared(isa, most, request.param)
    if isinstance(found, Unbuilt):
        pytest.skip(str(found))
    return found


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).bfloat16()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("inner", [32, 96, 896])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 16, 17, 32])
@pytest.mark.parametrize("sizes", [(16,), (17, 100, 33), (1536, 256, 250)], ids=str)
def test_as_near_as_torch(rows: Rows, inner: int, count: int, sizes: tuple[int, ...]) -> None:
    """Last blocks that overlap, an odd number of steps, one x for several weights, with bias and without."""
    x, weights = normal(1, count, inner), [normal(size, inner) for size in sizes]
    biases = [normal(size) if size % 2 == 0 else None for size in sizes]
    for out, weight, bias in zip(multiply(rows, x, weights, biases), weights, biases, strict=True):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert (out.shape, out.dtype) == (exact.shape, torch.bfloat16)
        assert error(out, exact) <= 1.5 * error(F.linear(x, weight, bias), exact)


def test_reads_rows_where_they_lie(rows: Rows) -> None:
    """A weight that is a part of a wider one (a fused projection's), and an x that is not contiguous."""
    wide, x = normal(200, 192), normal(128, 2).t()
    weight = wide[40:140, 64:]
    (out,) = multiply(rows, x, [weight], [None])
    torch.testing.assert_close(out, F.linear(x, weight), atol=0.0, rtol=1e-2)


def test_infinities_and_nans_stay_where_they_are(rows: Rows) -> None:
    x, weight = normal(3, 64), normal(48, 64)
    x[0, 5], x[1, 7], weight[20, 9] = math.inf, math.nan, math.nan
    (out,) = multiply(rows, x, [weight], [None])
    expected = F.linear(x, weight)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert torch.equal(out[expected.isinf()], expected[expected.isinf()])


def test_torchs_own_tiles_are_not_disturbed(rows: Rows) -> None:
    """oneDNN configures AMX's tiles too."""
    x, weight = normal(64, 256), normal(512, 256)
    before = F.linear(x, weight)
    multiply(rows, x[:5], [weight], [None])
    assert torch.equal(F.linear(x, weight), before)


def test_what_is_served() -> None:
    assert serves(normal(16, 32), normal(16))
    assert serves(normal(16, 64)[:, :32], None)
    for weight in (normal(15, 32), normal(16, 40), normal(16, 32).float(), normal(32, 16).t(), normal(2, 16, 32)):
        assert not serves(weight, None)
    assert not serves(normal(16, 32), normal(16).float())


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.bfloat16), (2, torch.float32), (40, torch.bfloat16)])
def test_the_operator_runs_torchs_for_the_rest(rows: int, dtype: torch.dtype) -> None:
    x, weights = normal(rows, 64).to(dtype), [normal(48, 64).to(dtype), normal(8, 64).to(dtype)]
    for out, weight in zip(SPEC.linear_rows(x, weights, [None, None]), weights, strict=True):
        assert torch.equal(out, F.linear(x, weight))


def test_the_operator_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specpass.ops.linear.few_rows", lambda: Unbuilt("a test"))
    x, weight = normal(1, 64), normal(48, 64)
    assert torch.equal(SPEC.linear_rows(x, [weight], [None])[0], F.linear(x, weight))
