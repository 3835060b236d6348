"""A CPU's own prefill attention: as near to float64 as torch's flash attention, in memory that does not grow as T^2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specpass.dialect.define import SPEC
from specpass.kernels.cpu import prefill
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.isa import AMX, AVX512, Isa
from specpass.kernels.cpu.tiles import prepared
from specpass.kernels.dispatch import choose
from specpass.ops import attention

SHAPES = [  # B, H, K, D, Dv, T
    (1, 12, 2, 128, 128, 700),
    (2, 14, 2, 64, 64, 333),
    (2, 4, 4, 32, 96, 31),
    (1, 4, 1, 256, 256, 520),
    (3, 3, 3, 64, 32, 1),
]
PLAIN = {"softcap": 0.0, "sinks": None, "sliding": 0, "chunk": 0, "bias": None}


def states(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as layers make them, [B, T, heads, D] in memory; peaked attention."""
    batch, heads, kv_heads, dim, value_dim, columns = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, columns, *sizes, generator=generator, dtype=dtype).transpose(1, 2)
        for sizes in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    )
    return query * 3, key, value


needs_tiles = pytest.mark.skipif(
    prefill.refuse(*states(SHAPES[0]), 0.1) is not None,
    reason="neither AMX nor AVX-512, or nothing that compiles for it",
)


@pytest.fixture(params=[AMX, AVX512], ids=lambda isa: isa.title)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isa:
    """Each way to multiply that this machine has, not only the one that is taken."""
    found = prepared("prefill", request.param)
    if isinstance(found, Unbuilt):
        pytest.skip(str(found))
    monkeypatch.setattr(prefill, "library", lambda name: found)
    return request.param


def reads(columns: int, sliding: int) -> Tensor:
    column = torch.arange(columns)
    behind = column[:, None] - column
    return (behind >= 0) & (behind < (sliding or columns))


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int) -> tuple[Tensor, Tensor]:
    """In float64: the output, and the log-sum-exp of the scores."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT * scale
    logits.masked_fill_(~reads(query.shape[2], sliding), float("-inf"))
    return logits.softmax(-1) @ value.repeat_interleave(group, 1), logits.logsumexp(-1)


def held_to_float64(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int) -> None:
    expected, expected_lse = exact(query, key, value, scale, sliding)
    out, lse = prefill.prefill(query, key, value, scale, sliding)
    torch.testing.assert_close(lse.double(), expected_lse, atol=5e-5, rtol=1e-6)
    assert out.transpose(1, 2).is_contiguous()
    mask = reads(query.shape[2], sliding)
    flash = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    ours, torchs = ((found.double() - expected).abs() for found in (out, flash))
    assert ours.square().mean() <= 1.5**2 * torchs.square().mean()
    assert ours.max() <= 1.5 * torchs.max()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sliding", [0, 1, 33, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_bfloat16(shape: tuple[int, ...], sliding: int) -> None:
    held_to_float64(*states(shape), shape[3] ** -0.5, sliding)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sliding", [0, 70])
@pytest.mark.parametrize("growth", [0.02, -0.02])
def test_a_maximum_that_rises_or_falls_along_the_prompt(growth: float, sliding: int) -> None:
    """Scores pass the running maximum by many powers of two, again and again, or stay far below the first."""
    query, key, value = states(SHAPES[1])
    level = torch.arange(key.shape[2]).mul(growth).to(key.dtype)[:, None]
    query[..., 0], key[..., :1] = 8.0, 8 * level
    held_to_float64(query, key, value, 1.0, sliding)


@needs_tiles
def test_rows_of_a_batch_and_later_columns_change_nothing() -> None:
    query, key, value = states((3, 4, 2, 64, 64, 130))
    out, lse = prefill.prefill(query, key, value, 0.1)
    alone, alone_lse = prefill.prefill(*(tensor[1:2, :, :77] for tensor in (query, key, value)), 0.1)
    assert torch.equal(out[1:2, :, :77], alone)
    assert torch.equal(lse[1:2, :, :77], alone_lse)


@needs_tiles
def test_the_operators_run_it() -> None:
    given = states(SHAPES[1])
    heads = given[0].shape[1]
    out, lse = prefill.prefill(*given, 0.1)
    rows = torch.tensor([[-1, 300, 332], [0, 5, -1]])
    found, found_lse = SPEC.prefill_attention_lse(*given, rows, 0.1)
    assert torch.equal(SPEC.prefill_attention(*given, 0.1), out)
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse.gather(2, rows.clamp(min=0)[:, None].expand(-1, heads, -1)))
    sinks = torch.randn(heads)
    mine = SPEC.prefill_attention(*given, 0.1, 0.0, sinks, 50)
    blocks = attention.prefill_in_blocks(*given, 0.1, 0.0, sinks, 50, 0, None)
    torch.testing.assert_close(mine, blocks, atol=8e-2, rtol=3e-2)  # both scale outputs in bfloat16


class Allocated(TorchDispatchMode):
    """Bytes of each storage that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.storages[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
        return out


@needs_tiles
def test_memory_grows_with_the_columns_alone() -> None:
    """What the library takes itself is a block for each thread: see `Worker` in prefill.cpp."""
    given = states((1, 4, 1, 64, 64, 3008))
    with Allocated() as allocated:
        out, lse = prefill.prefill(*given, 0.1)
    key_and_value = given[1:]  # once more, in tiles
    assert sum(allocated.storages.values()) == sum(each.nbytes for each in (out, lse, *key_and_value))


def test_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    given = states(SHAPES[1])
    monkeypatch.setattr(prefill, "library", lambda name: Unbuilt("no C++ compiler"))
    operands = dict(zip(("query", "key", "value"), given, strict=True), scale=0.1, **PLAIN)
    assert str(choose("prefill_attention", operands)) == "prefill_attention: aten (no C++ compiler)"
    capped = choose("prefill_attention", {**operands, "softcap": 3.0})
    assert (capped.kernel, "soft cap" in capped.reason) == (None, True)
    query, key, value = given
    assert prefill.refuse(query.float(), key, value, 0.1) == "float32, where AMX and AVX-512 multiply bfloat16"
    assert "head dimension 80" in str(prefill.refuse(*states((1, 2, 2, 80, 80, 4)), 0.1))
    assert "contiguous" in str(prefill.refuse(query.mT.contiguous().mT, key, value, 0.1))
    assert "not above 0" in str(prefill.refuse(*given, -0.1))
    expected, expected_lse = exact(*given, 0.1, 0)
    rows = torch.arange(given[0].shape[2]).expand(2, -1)
    for out in (SPEC.prefill_attention(*given, 0.1), SPEC.prefill_attention_lse(*given, rows, 0.1)[0]):
        torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    lse = SPEC.prefill_attention_lse(*given, rows, 0.1)[1]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
