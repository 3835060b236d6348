"""A decode step's attention in C++, each way: as near to float64 as aten's, and what it leaves to aten."""

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
from specpass.kernels.shapes import name_of

FLOAT, BF16 = torch.float32, torch.bfloat16
SLACK = 1e-6  # of numbers of about 1, beside aten's own error
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
WAYS = [(name, dtype) for name, way in decode.WAYS.items() for dtype in way.dtypes]


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


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{name_of(way[1])}")
def way(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A way's name and a dtype that it reads, where this CPU has it."""
    name, dtype = request.param
    refused = decode.WAYS[name].refuse(fresh(operands(*CASES["no group"]), dtype))
    if refused:
        pytest.skip(refused)
    return name, dtype


def attend(name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    assert decode.WAYS[name].refuse(given) is None
    return decode.append_attend(name, **given)


def check(way: tuple[str, torch.dtype], given: dict[str, Any]) -> None:
    """As near to float64 as aten, and the same storage."""
    name, dtype = way
    ours, plain, exact = fresh(given, dtype), fresh(given, dtype), fresh(fresh(given, dtype), torch.float64)
    expected = reference.append_attend(**exact)
    found = attend(name, ours)[0]
    theirs = reference.append_attend(**plain)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    error, aten = (float((out.double() - expected).abs().max()) for out in (found, theirs))
    assert error <= 1.5 * aten + SLACK
    for part in ("keys", "values", "lengths"):
        assert torch.equal(ours[part], plain[part])


@pytest.mark.parametrize("case", CASES)
def test_as_near_as_aten(way: tuple[str, torch.dtype], case: str) -> None:
    check(way, operands(*CASES[case]))


@pytest.mark.parametrize("tokens", [1, 4])
def test_heads_with_budgets_of_their_own(way: tuple[str, torch.dtype], tokens: int) -> None:
    """One storage, in which other layers' heads may lie in between."""
    given = operands(2, 12, 2, 64, 96, 500, [[3, 620], [301, 40]], 0, tokens)
    check(way, given | {"offsets": torch.tensor([[17, 300], [600, 2]])})


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "change",
    [{"softcap": 2.0}, {"sinks": torch.linspace(-1, 4, 12)}, {"chunk": 64}, {"softcap": 30.0, "sliding": 50}],
    ids=lambda change: "-".join(change),
)
def test_what_models_do_to_logits(way: tuple[str, torch.dtype], change: dict[str, Any], tokens: int) -> None:
    """Of a chunk's first token and of its last, and of queries on both sides of a border."""
    given = operands(2, 12, 2, 64, 64, 320, [[63, 64], [191, 190]], 0, tokens) | change
    if not decode.WAYS[way[0]].changes:
        assert change.keys() & {"softcap", "sinks", "chunk"}
        assert decode.WAYS[way[0]].refuse(fresh(given, way[1])) == "soft caps, sinks and chunks"
        return
    check(way, given)


def test_head_dimensions_of_any_block(way: tuple[str, torch.dtype]) -> None:
    block = decode.WAYS[way[0]].block
    check(way, operands(1, 6, 2, 3 * block, 5 * block, 90, 77, 0))


@pytest.mark.parametrize("case", ["group of 6", "splits"])
def test_log_sum_exp(way: tuple[str, torch.dtype], case: str) -> None:
    given = fresh(operands(*CASES[case]), way[1])
    names = ("keys", "values", "lengths", "query", "key", "value", "scale")
    ours, exact = fresh(given, way[1]), fresh(given, torch.float64)
    out, lse = attend(way[0], {name: ours[name] for name in names})
    expected, natural = reference.append_attend_lse(*(exact[name] for name in names))
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, natural.float(), atol=1e-5, rtol=1e-5)


def test_operators_go_the_first_way_that_serves(way: tuple[str, torch.dtype]) -> None:
    given = fresh(operands(*CASES["group of 6"]), way[1])
    chosen = choose("append_attend", given).kernel
    assert chosen in decode.WAYS
    expected, lse = attend(str(chosen), fresh(given, way[1]))
    assert torch.equal(SPEC.append_attend(*fresh(given, way[1]).values()), expected)
    found = SPEC.append_attend_lse(*list(fresh(given, way[1]).values())[:7])
    assert torch.equal(found[1], lse)


def test_a_full_storage_is_an_error_and_nothing_is_written(way: tuple[str, torch.dtype]) -> None:
    given = fresh(operands(1, 4, 2, 32, 32, 20, [[3, 17]], 0, 4), way[1])
    ours = fresh(given, way[1])
    with pytest.raises(IndexError, match="no free slot: 20 are in use"):
        attend(way[0], ours)
    assert torch.equal(ours["keys"], given["keys"])
    assert torch.equal(ours["lengths"], given["lengths"])


def test_a_nan_stays(way: tuple[str, torch.dtype]) -> None:
    given = fresh(operands(1, 4, 2, 32, 32, 40, 20, 0), way[1])
    given["keys"][0, 3, 5] = math.nan
    out = attend(way[0], given)[0]
    assert out[0, :2].isnan().all()
    assert out[0, 2:].isfinite().all()


REFUSED = {
    "float16, where AVX2 reads float32 and bfloat16": {"dtype": torch.float16},
    "head dimension 20: no multiple of 8": {"dim": 20},
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
