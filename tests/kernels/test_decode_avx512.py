"""A decode step's attention in C++: as near to float64 as aten's, and what it leaves to aten."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import specpass.ops  # noqa: F401  (says where libraries are kept)
from specpass.dialect.define import SPEC
from specpass.kernels.cpu import decode
from specpass.kernels.decode import reference
from specpass.kernels.dispatch import choose

BF16 = torch.bfloat16
# B, H, K, D, Dv, P, slots in use, sliding, new tokens (one where left out)
CASES = {
    "group of 6": (1, 12, 2, 128, 128, 320, 256, 0),
    "lengths of their own": (2, 14, 2, 64, 64, 100, [[0, 7], [31, 99]], 0),
    "splits": (1, 3, 3, 32, 96, 5000, 4097, 0),
    "group of 16, a window": (3, 32, 2, 64, 64, 700, 500, 100),
    "a window that is not full": (2, 8, 8, 96, 96, 300, 20, 64),
    "no group": (1, 9, 9, 256, 256, 300, 17, 0),
    "five tokens": (2, 12, 2, 128, 64, 320, [[256, 3], [0, 315]], 0, 5),
    "eight tokens, splits, a window": (1, 14, 2, 64, 64, 5000, 4000, 1100, 8),
    "a window narrower than the tokens": (2, 4, 2, 32, 32, 200, 130, 3, 6),
}


def operands(
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    slots: int,
    used: Any,
    sliding: int,
    tokens: int = 1,
) -> Any:
    """Of `append_attend`; new tokens lie as models hand them over."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).bfloat16()

    return {
        "keys": normal(batch, kv_heads * slots, dim),
        "values": normal(batch, kv_heads * slots, value_dim),
        "lengths": torch.full((batch, kv_heads), used) if isinstance(used, int) else torch.tensor(used),
        "query": normal(batch, tokens, heads, dim).transpose(1, 2),
        "key": normal(batch, tokens, kv_heads, dim).transpose(1, 2),
        "value": normal(batch, tokens, kv_heads, value_dim).transpose(1, 2),
        "scale": 1 / math.sqrt(dim),
        "softcap": 0.0,
        "sinks": None,
        "sliding": sliding,
        "chunk": 0,
    }


def fresh(given: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A copy to write into."""
    tensors = {name: each.clone() for name, each in given.items() if isinstance(each, Tensor)}
    return given | {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}


@pytest.fixture
def library() -> None:
    refused = decode.refuse(operands(*CASES["no group"]))
    if refused:
        pytest.skip(refused)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", CASES)
def test_as_near_as_aten(case: str) -> None:
    given = operands(*CASES[case])
    ours, plain, exact = fresh(given), fresh(given), fresh(given, torch.float64)
    assert decode.refuse(ours) is None
    expected = reference.append_attend(**exact)
    found = SPEC.append_attend(*ours.values())
    theirs = reference.append_attend(**plain)
    assert (found.shape, found.dtype) == (expected.shape, torch.bfloat16)
    error, aten = (float((out.double() - expected).abs().max()) for out in (found, theirs))
    assert error <= 1.5 * aten
    for name in ("keys", "values", "lengths"):
        assert torch.equal(ours[name], plain[name])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [1, 4])
def test_heads_with_budgets_of_their_own(tokens: int) -> None:
    """One storage, in which other layers' heads may lie in between."""
    given = operands(2, 12, 2, 64, 96, 500, [[3, 620], [301, 40]], 0, tokens)
    offsets = torch.tensor([[17, 300], [600, 2]])
    ours, plain, exact = (fresh(given, dtype) | {"offsets": offsets} for dtype in (BF16, BF16, torch.float64))
    assert decode.refuse(ours) is None
    expected = reference.append_attend(**exact)
    found, theirs = SPEC.append_attend(*ours.values()), reference.append_attend(**plain)
    error, aten = (float((out.double() - expected).abs().max()) for out in (found, theirs))
    assert error <= 1.5 * aten
    for name in ("keys", "values", "lengths"):
        assert torch.equal(ours[name], plain[name])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", ["group of 6", "splits"])
def test_log_sum_exp(case: str) -> None:
    given = operands(*CASES[case])
    names = ("keys", "values", "lengths", "query", "key", "value", "scale")
    ours, exact = fresh(given), fresh(given, torch.float64)
    out, lse = SPEC.append_attend_lse(*(ours[name] for name in names))
    expected, natural = reference.append_attend_lse(*(exact[name] for name in names))
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, natural.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("library")
def test_a_full_storage_is_an_error_and_nothing_is_written() -> None:
    given = operands(1, 4, 2, 32, 32, 20, [[3, 17]], 0, 4)
    ours = fresh(given)
    with pytest.raises(IndexError, match="no free slot: 20 are in use"):
        SPEC.append_attend(*ours.values())
    assert torch.equal(ours["keys"], given["keys"])
    assert torch.equal(ours["lengths"], given["lengths"])


@pytest.mark.usefixtures("library")
def test_a_nan_stays() -> None:
    given = operands(1, 4, 2, 32, 32, 40, 20, 0)
    given["keys"][0, 3, 5] = math.nan
    out = SPEC.append_attend(*given.values())
    assert out[0, :2].isnan().all()
    assert out[0, 2:].isfinite().all()


REFUSED = {
    "float32": {"dtype": torch.float32},
    "head dimension 48: no multiple of 32": {"dim": 48},
    "soft caps, sinks and chunks are aten's": {"softcap": 30.0},
    "9 new tokens: more than 8 are aten's": {"tokens": 9},
}


@pytest.mark.parametrize("why", REFUSED)
def test_leaves_the_rest_to_aten(why: str) -> None:
    """With that reason, and with aten's numbers."""
    change = dict(REFUSED[why])
    dim, tokens = change.pop("dim", 32), change.pop("tokens", 1)
    given = fresh(operands(2, 4, 2, dim, dim, 40, 20, 0), change.pop("dtype", torch.bfloat16)) | change
    given |= {name: given[name].repeat(1, 1, tokens, 1) for name in ("query", "key", "value")}
    choice = choose("append_attend", given)
    assert choice.kernel is None
    assert why in choice.reason
    ours, plain = fresh(given, given["query"].dtype), fresh(given, given["query"].dtype)
    assert torch.equal(SPEC.append_attend(*ours.values()), reference.append_attend(**plain))
