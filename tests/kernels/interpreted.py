"""Every Triton kernel, run by Triton's interpreter on the CPU, against its reference.

test_kernels_interpreter.py starts it, as a process of its own: TRITON_INTERPRET is read when Triton is
imported, and changes it for good.
Run by hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specpass.kernels.bits.reference import quantize_kv
from specpass.kernels.decode.reference import append_kv
from specpass.kernels.registry import REGISTRY
from specpass.kernels.tiles import Tile
from specpass.ops import rows as rows_ops
from specpass.ops import select as select_ops

triton = pytest.importorskip("triton")

SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
DIMS = st.sampled_from([8, 24, 64, 80])
FEW = settings(max_examples=20, deadline=None, derandomize=True)
# Scores are float32 in every kernel; outputs are rounded to the storage's dtype, as the reference's are.
OUTPUT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_this_process_interprets() -> None:
    assert triton.knobs.runtime.interpret, "start with TRITON_INTERPRET=1"


def softmax_rows(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Natural log-sum-exp [B, H, R] of each row over the columns at or before it and its sink, in float64."""
    wide = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ wide.transpose(2, 3) * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    hidden = torch.arange(key.shape[2]) > rows[:, None, :, None]
    lse = logits.masked_fill(hidden, float("-inf")).logsumexp(-1)
    return (lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])).float()


def changes(data: Any, heads: int) -> tuple[float, torch.Tensor | None]:
    """A soft cap that bends or none, sinks of natural size or none."""
    sinks = torch.randn(heads) if data.draw(st.booleans()) else None
    return data.draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])), sinks


@FEW
@given(st.data(), DTYPES, DIMS, st.sampled_from(["max", "mean", "sum"]), st.booleans(), SEEDS)
def test_importance_with_and_without_the_log_sum_exp(
    data: Any, dtype: torch.dtype, dim: int, reduce: str, weighted: bool, seed: int
) -> None:
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    group = data.draw(st.sampled_from([1, 3, 7]))
    window, ahead = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    kept = data.draw(st.sampled_from([window, 0]))  # SpecPC scores the window's columns too
    lengths = torch.tensor([data.draw(st.integers(1, 75)) for _ in range(batch)])
    columns = int(lengths.max()) + ahead
    torch.manual_seed(seed)
    # [B, T, heads, D] seen as [B, heads, T, D], as models hand keys over
    key = torch.randn(batch, columns, kv_heads, dim).to(dtype).transpose(1, 2)
    query = (3 * torch.randn(batch, columns, kv_heads * group, dim)).to(dtype).transpose(1, 2)
    rows = rows_ops.score_rows(lengths, torch.randint(1, 6, (batch, ahead)) if ahead else None, window, [2])
    taken, scale = rows_ops.take_rows(query, rows), 1 / math.sqrt(dim)
    weights = torch.linspace(0, 1, window + ahead) if weighted else None
    softcap, sinks = changes(data, kv_heads * group)
    operands: dict[str, Any] = {
        "query": taken,
        "key": key,
        "rows": rows,
        "lengths": lengths,
        "window": kept,
        "scale": scale,
        "reduce": reduce,
        "weights": weights,
        "lse": None,
        "softcap": softcap,
        "sinks": sinks,
    }
    expected = REGISTRY["importance"].reference(**operands)
    tile = Tile(data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32])))
    given = operands | {"lse": softmax_rows(taken, key, rows, scale, softcap, sinks)}
    for name, call in (("importance", operands), ("importance_given_lse", given)):
        for found in (REGISTRY[name].launch(call, tile), REGISTRY[name].reference(**call)):
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_equal_scores_stay_equal_across_tiles_so_that_ties_go_to_the_lower_position() -> None:
    batch, kv_heads, group, dim, window, size = 1, 2, 3, 16, 4, 70
    torch.manual_seed(0)
    key = torch.randn(batch, kv_heads, 1, dim).expand(-1, -1, size, -1).contiguous()  # one plateau over five tiles
    lengths = torch.tensor([size])
    rows = rows_ops.score_rows(lengths, None, window, [])
    taken = rows_ops.take_rows(torch.randn(batch, kv_heads * group, size, dim), rows)
    operands = {"query": taken, "key": key, "rows": rows, "lengths": lengths, "window": window, "scale": 0.25}
    plain = {"reduce": "max", "weights": None, "lse": None, "softcap": 0.0, "sinks": None}
    scores = REGISTRY["importance"].launch(operands | plain, Tile(16))
    assert (scores[..., : size - window] == scores[..., :1]).all()
    kept = select_ops.select(scores, lengths, window + 3, window, 7, "max")
    assert kept.tolist() == [[[0, 1, 2, 66, 67, 68, 69]] * kv_heads]


@FEW
@given(st.data(), DTYPES, DIMS, st.sampled_from(["max", "mean"]), SEEDS)
def test_reconstruction(data: Any, dtype: torch.dtype, dim: int, reduce: str, seed: int) -> None:
    batch, kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4))
    window, ahead = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    lengths = torch.tensor([data.draw(st.integers(1, 75)) for _ in range(batch)])
    columns = int(lengths.max()) + ahead
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(batch, columns, heads, size).to(dtype).transpose(1, 2)
        for heads, size in ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, 16))
    )
    rows = rows_ops.score_rows(lengths, torch.randint(1, 6, (batch, ahead)) if ahead else None, window, [2])
    softcap, sinks = changes(data, kv_heads * group)
    operands: dict[str, Any] = {"query": rows_ops.take_rows(query, rows), "key": key, "value": value, "rows": rows}
    operands |= {"lengths": lengths, "window": window, "scale": 1 / math.sqrt(dim), "reduce": reduce}
    operands |= {"softcap": softcap, "sinks": sinks}
    kernel, tile = REGISTRY["reconstruction"], Tile(*(data.draw(st.sampled_from([16, 32])) for _ in range(2)))
    expected = kernel.reference(**operands)
    # Where a row sees little but one column, o is nearly its value, and |v - o| has the rounding of both.
    torch.testing.assert_close(kernel.launch(operands, tile), expected, atol=1e-3, rtol=1e-4)


@settings(FEW, max_examples=15)
@given(st.data(), DTYPES, DIMS, st.sampled_from([1, 3, 7]), SEEDS)
def test_sparse_prefill(data: Any, dtype: torch.dtype, dim: int, group: int, seed: int) -> None:
    """Prompts of a batch are read sparsely or whole, and may be shorter than the window."""
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    window, ahead = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
    width, recent = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    lengths = torch.tensor([data.draw(st.integers(2, 45)) for _ in range(batch)])
    columns = int(lengths.max()) + ahead
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(batch, columns, heads, size).to(dtype).transpose(1, 2)
        for heads, size in ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, 16))
    )
    chosen = select_ops.select(torch.rand(batch, kv_heads, columns), lengths, width, 0, 1, "max")
    sizes: dict[str, Any] = {"scale": 0.3, "window": window, "ahead": ahead, "recent": recent}
    operands: dict[str, Any] = {"columns": chosen, "lengths": lengths, **sizes}
    kernel, tile = REGISTRY["sparse_prefill"], Tile(16, data.draw(st.sampled_from([16, 32])))
    states = {"query": query, "key": key, "value": value}
    expected = kernel.reference(**{name: each.double() for name, each in states.items()}, **operands).to(dtype)
    found = kernel.launch(states | operands, tile)
    assert found.transpose(1, 2).is_contiguous()
    for row, length in enumerate(lengths.tolist()):
        own, behind = found[row, :, : length + ahead], found[row, :, length + ahead :]
        wanted = expected[row, :, : length + ahead]
        torch.testing.assert_close(own, wanted, atol=OUTPUT[dtype], rtol=2 * OUTPUT[dtype])
        assert not behind.any()


@FEW
@given(st.data(), DTYPES, DIMS, SEEDS)
def test_gather_copies_bit_for_bit(data: Any, dtype: torch.dtype, dim: int, seed: int) -> None:
    batch, kv_heads, columns, room = (data.draw(st.integers(1, high)) for high in (2, 3, 40, 9))
    window = data.draw(st.integers(1, 4))
    budget = data.draw(st.sampled_from([window + 1, 11, columns, columns + 3]))
    torch.manual_seed(seed)
    key = torch.randn(batch, columns, kv_heads, dim).to(dtype).transpose(1, 2)
    value = torch.randn(batch, kv_heads, columns, 16).to(dtype)
    positions = torch.full((batch, kv_heads, budget), -1)
    for row in range(batch):
        for head in range(kv_heads):
            count = data.draw(st.integers(0, min(budget, columns)))
            positions[row, head, :count] = torch.randperm(columns)[:count].sort().values
    gather, operands = REGISTRY["gather"], {"key": key, "value": value, "positions": positions, "room": room}
    found = gather.launch(operands, Tile(data.draw(st.sampled_from([4, 16]))))
    for mine, theirs in zip(found, gather.reference(**operands), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@FEW
@given(st.data(), DTYPES, st.sampled_from([8, 64, 80, 96]), st.sampled_from([1, 2, 7, 16]), SEEDS)
def test_decode_attention_and_its_writing_variant(
    data: Any, dtype: torch.dtype, dim: int, group: int, seed: int
) -> None:
    batch, kv_heads, budget, room = (data.draw(st.integers(1, high)) for high in (2, 2, 50, 20))
    slots, heads = budget + room, (batch, kv_heads)
    before = torch.tensor(
        [
            data.draw(st.sampled_from([0, budget - 1, budget, slots - 1]))  # t = 0 .. t = N
            for _ in range(batch * kv_heads)
        ]
    ).view(heads)
    torch.manual_seed(seed)
    keys, values = (torch.randn(*heads, slots, d).to(dtype) for d in (dim, 16))
    for states in (keys, values):  # free slots hold what no softmax may meet
        states.masked_fill_((torch.arange(slots) >= before[..., None])[..., None], 3e4)
    query = torch.randn(batch, kv_heads * group, 1, dim).to(dtype)
    new = tuple(torch.randn(*heads, 1, d).to(dtype) for d in (dim, 16))
    expected = keys.clone(), values.clone(), before.clone()
    append_kv(expected[0].flatten(1, 2), expected[1].flatten(1, 2), expected[2], *new)
    softcap, sinks = changes(data, kv_heads * group)
    common = {"scale": 0.3, "softcap": softcap, "sinks": sinks}
    doubles = [states.double() for states in (query, *expected[:2])]
    decode = REGISTRY["decode"]
    plain = decode.reference(*doubles, expected[2], **common).to(dtype)
    tile = Tile(16, splits=data.draw(st.integers(1, 4)))
    tolerance = {"atol": OUTPUT[dtype], "rtol": 2 * OUTPUT[dtype]}
    after = dict(zip(("keys", "values", "lengths"), expected, strict=True))
    torch.testing.assert_close(decode.launch({"query": query, **after, **common}, tile), plain, **tolerance)
    lengths = before.clone()
    operands = {"keys": keys.flatten(1, 2), "values": values.flatten(1, 2), "lengths": lengths, "query": query}
    operands |= {"key": new[0], "value": new[1], **common}
    torch.testing.assert_close(REGISTRY["decode_append"].launch(operands, tile), plain, **tolerance)
    for mine, theirs in zip((keys, values, lengths), expected, strict=True):
        assert torch.equal(mine, theirs)


@FEW
@given(
    st.data(),
    DTYPES,
    st.sampled_from([(8, 64), (64, 72), (128, 128)]),
    st.sampled_from([8, 4]),
    st.integers(1, 3),
    SEEDS,
)
def test_decode_attention_over_codes(
    data: Any, dtype: torch.dtype, dims: tuple[int, int], bits: int, splits: int, seed: int
) -> None:
    """Heads with fewer slots than others, blocks that are partly filled, nothing or little behind them."""
    torch.manual_seed(seed)
    slots, room, heads = data.draw(st.integers(1, 150)), 48, (2, 2)
    keys, values = (torch.randn(2, 2 * (slots + room), dim).to(dtype) for dim in dims)
    own = quantize_kv(keys, values, torch.randint(1, slots + 1, heads), slots, room, bits)
    behind = [states.unflatten(1, (2, room)) for states in own[:2]]
    softcap, sinks = changes(data, 6)
    operands = {"query": torch.randn(2, 6, 1, dims[0]).to(dtype), "keys": behind[0], "values": behind[1]}
    operands |= {"lengths": torch.randint(0, room + 1, heads), "scale": 0.2, "softcap": softcap, "sinks": sinks}
    operands |= {"quantized": own[3:], "bits": bits}
    kernel, tile = REGISTRY["decode_codes"], Tile(data.draw(st.sampled_from([16, 64])), splits=splits)
    expected = kernel.reference(**operands)
    tolerance = {"atol": 4 * OUTPUT[dtype], "rtol": 4 * OUTPUT[dtype]}  # the kernel rounds what it makes of codes
    torch.testing.assert_close(kernel.launch(operands, tile), expected, **tolerance)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_of_heads_with_budgets_of_their_own(dtype: torch.dtype, splits: int) -> None:
    """One storage, in which other layers' heads may lie in between, and free slots hold what no softmax may meet."""
    torch.manual_seed(splits)
    lengths, offsets = torch.tensor([[3, 70], [33, 0]]), torch.tensor([[17, 25], [60, 2]])
    keys, values = (torch.randn(2, 120, width).to(dtype) for width in (24, 16))
    slot = torch.arange(120)
    inside = (slot >= offsets[..., None]) & (slot < (offsets + lengths)[..., None])
    for states in (keys, values):
        states.masked_fill_(~inside.any(1)[..., None], 3e4)
    operands = {"keys": keys, "values": values, "lengths": lengths, "query": torch.randn(2, 6, 1, 24).to(dtype)}
    operands |= {name: torch.randn(2, 2, 1, width).to(dtype) for name, width in (("key", 24), ("value", 16))}
    operands["offsets"] = offsets
    twin: dict[str, Any] = {name: tensor.clone() for name, tensor in operands.items()}
    append = REGISTRY["decode_append"]
    tolerance = {"atol": 2 * OUTPUT[dtype], "rtol": 2 * OUTPUT[dtype]}
    out = append.launch({**operands, "scale": 0.3}, Tile(16, splits=splits))
    torch.testing.assert_close(out, append.reference(**twin, scale=0.3), **tolerance)
    assert all(torch.equal(operands[name], twin[name]) for name in twin)
    read = {name: operands[name] for name in ("query", "keys", "values", "lengths", "offsets")}
    torch.testing.assert_close(REGISTRY["decode"].launch({**read, "scale": 0.3}, Tile(16, splits=splits)), out)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_that_returns_its_log_sum_exp(dtype: torch.dtype, splits: int) -> None:
    kernel, slots = REGISTRY["decode_append_lse"], 90
    torch.manual_seed(splits)
    operands = {name: torch.randn(2, 2 * slots, 24).to(dtype) for name in ("keys", "values")}
    operands |= {"lengths": torch.tensor([[0, 7], [60, slots - 1]]), "query": torch.randn(2, 6, 1, 24).to(dtype)}
    operands |= {name: torch.randn(2, 2, 1, 24).to(dtype) for name in ("key", "value")}
    twin: dict[str, Any] = {name: tensor.clone() for name, tensor in operands.items()}
    found = kernel.launch({**operands, "scale": 0.3}, Tile(16, splits=splits))
    out, lse = kernel.reference(**twin, scale=0.3)
    torch.testing.assert_close(found[0], out, atol=OUTPUT[dtype], rtol=2 * OUTPUT[dtype])
    torch.testing.assert_close(found[1], lse, atol=2e-6, rtol=2e-5)
    assert all(torch.equal(operands[name], twin[name]) for name in twin)


@pytest.mark.parametrize("splits", [1, 3])
def test_an_empty_head_attends_to_nothing(splits: int) -> None:
    keys, values = (torch.full((1, 2, 48, 16), float("nan")) for _ in range(2))
    keys[:, 1], values[:, 1] = 1.0, 2.0
    lengths = torch.tensor([[0, 5]])
    query = torch.ones(1, 2, 1, 16)
    operands = {"query": query, "keys": keys, "values": values, "lengths": lengths, "scale": 0.3, "softcap": 0.0}
    out = REGISTRY["decode"].launch(operands | {"sinks": None}, Tile(16, splits=splits))
    assert not out[:, 0].any()
    torch.testing.assert_close(out[:, 1], torch.full((1, 1, 16), 2.0))
