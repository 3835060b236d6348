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
from specpass.kernels.cpu.linear import Rows, multiply, prepared, serves, vectors

BF16 = torch.bfloat16
LIBRARIES = {
    "amx": (BF16, lambda: prepared(AMX, 32, "amx")),
    "dot": (BF16, lambda: prepared(AVX512, 8, "dot")),
    "vectors of bfloat16": (BF16, lambda: vectors(BF16)),
    "vectors of float32": (torch.float32, lambda: vectors(torch.float32)),
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> tuple[Rows, torch.dtype]:
    """A library and the dtype that it multiplies."""
    dtype, make = LIBRARIES[request.param]
    found = make()
    if isinstance(found, Unbuilt):
        pytest.skip(str(found))
    return found, dtype


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).bfloat16()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("inner", [32, 96, 896])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 16, 17, 32])
@pytest.mark.parametrize("sizes", [(16,), (17, 100, 33), (1536, 256, 250)], ids=str)
def test_as_near_as_torch(library: tuple[Rows, torch.dtype], inner: int, count: int, sizes: tuple[int, ...]) -> None:
    """Last blocks that overlap, an odd number of steps, one x for several weights, with bias and without."""
    rows, dtype = library
    x, weights = normal(1, count, inner).to(dtype), [normal(size, inner).to(dtype) for size in sizes]
    biases = [normal(size).to(dtype) if size % 2 == 0 else None for size in sizes]
    for out, weight, bias in zip(multiply(rows, x, weights, biases), weights, biases, strict=True):
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert (out.shape, out.dtype) == (exact.shape, dtype)
        slack = 1e-6 * inner if dtype == torch.float32 else 0.0  # the order of sums
        assert error(out, exact) <= 1.5 * error(F.linear(x, weight, bias), exact) + slack


def test_reads_rows_where_they_lie(library: tuple[Rows, torch.dtype]) -> None:
    """A weight that is a part of a wider one (a fused projection's), and an x that is not contiguous."""
    rows, dtype = library
    wide, x = normal(200, 192).to(dtype), normal(128, 2).to(dtype).t()
    weight = wide[40:140, 64:]
    (out,) = multiply(rows, x, [weight], [None])
    slack = 1e-4 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(out, F.linear(x, weight), atol=slack, rtol=1e-2)


def test_infinities_and_nans_stay_where_they_are(library: tuple[Rows, torch.dtype]) -> None:
    rows, dtype = library
    x, weight = normal(3, 64).to(dtype), normal(48, 64).to(dtype)
    x[0, 5], x[1, 7], weight[20, 9] = math.inf, math.nan, math.nan
    (out,) = multiply(rows, x, [weight], [None])
    expected = F.linear(x, weight)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert torch.equal(out[expected.isinf()], expected[expected.isinf()])


def test_torchs_own_tiles_are_not_disturbed(library: tuple[Rows, torch.dtype]) -> None:
    """oneDNN configures AMX's tiles too."""
    rows, dtype = library
    x, weight = normal(64, 256).to(dtype), normal(512, 256).to(dtype)
    before = F.linear(x, weight)
    multiply(rows, x[:5], [weight], [None])
    assert torch.equal(F.linear(x, weight), before)


def test_what_is_served() -> None:
    assert serves(normal(16, 32), normal(16))
    assert serves(normal(16, 64)[:, :32], None)
    assert serves(normal(16, 16).float(), normal(16).float())
    refused = (normal(15, 32), normal(16, 40), normal(16, 32).half(), normal(32, 16).t(), normal(2, 16, 32))
    for weight in (*refused, normal(16, 24).float()):
        assert not serves(weight, None)
    assert not serves(normal(16, 32), normal(16).float())


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.bfloat16), (2, torch.float16), (40, torch.bfloat16)])
def test_the_operator_runs_torchs_for_the_rest(rows: int, dtype: torch.dtype) -> None:
    x, weights = normal(rows, 64).to(dtype), [normal(48, 64).to(dtype), normal(8, 64).to(dtype)]
    for out, weight in zip(SPEC.linear_rows(x, weights, [None, None]), weights, strict=True):
        assert torch.equal(out, F.linear(x, weight))


def test_the_operator_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specpass.ops.linear.few_rows", lambda dtype: Unbuilt("a test"))
    x, weight = normal(1, 64), normal(48, 64)
    assert torch.equal(SPEC.linear_rows(x, [weight], [None])[0], F.linear(x, weight))
