"""Products in float32 of what a CPU has no instructions for, whatever this one has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specpass.graph.walk import ATEN
from specpass.kernels.cpu import prefill, wide
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.decode import reference
from specpass.ops import attention, linear, sparse

BF16 = torch.bfloat16
PRODUCTS = (ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm)  # flash attention multiplies in float32 itself


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX2 alone; without libraries, which would multiply a prompt's attention on others."""
    monkeypatch.setattr(wide, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(prefill, "refuse", lambda *_: "a test")
    monkeypatch.setattr(linear, "few_rows", lambda dtype: Unbuilt("a test"))


class Products(TorchDispatchMode):
    """Writes down the operands of products."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.operands += [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        return func(*args, **(kwargs or {}))


def states(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 40),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([BF16, torch.float16]),
    biased=st.booleans(),
    turned=st.booleans(),
)
def test_linear_is_float32s_rounded_once(
    rows: int, features: int, blocks: tuple[int, int], dtype: torch.dtype, biased: bool, turned: bool
) -> None:
    """Whatever the blocks, and where x and W are views; no operand is larger than a block."""
    x, weight = states(1, 24, rows, dtype=dtype).transpose(1, 2), states(24, features, dtype=dtype).t()
    if not turned:
        x, weight = x.contiguous(), weight.contiguous()
    bias = states(features, dtype=dtype) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with pytest.MonkeyPatch.context() as patch, Products() as seen:
        patch.setattr(wide, "FEATURES", blocks[0])
        patch.setattr(wide, "ROWS", blocks[1])
        found = wide.linear(x, weight, bias)
    assert (found.shape, found.dtype) == (exact.shape, dtype)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps / 2 * 1.01)
    assert {operand.dtype for operand in seen.operands} == {torch.float32}
    assert max(operand.numel() for operand in seen.operands) <= 24 * max(blocks)


def test_weights_that_want_gradients_are_multiplied_too() -> None:
    """Their owner is told what to do elsewhere (GradientsError), and not by a product."""
    x, weight, bias = states(1, 9, 24), states(5, 24).requires_grad_(), states(5).requires_grad_()
    assert not wide.linear(x, weight, bias).requires_grad


B, H, K, T, D = 1, 4, 2, 70, 16
QUERY, KEY, VALUE = states(B, H, T, D), states(B, K, T, D), states(B, K, T, D + 1)[..., :D]
LENGTHS = torch.tensor([[T] * K])
BIAS = states(1, H, T).float()
CALLS: dict[str, Callable[..., Tensor]] = {
    "prompt": lambda *s: attention.prefill_attention(*s, 0.25),
    "one head a group": lambda q, k, v: attention.prefill_attention(q[:, :K], k, v, 0.25),
    "narrow values": lambda q, k, v: attention.prefill_attention(q, k, v[..., :8], 0.25),
    "narrow values, masked": lambda q, k, v: attention.prefill_attention(q, k, v[..., :8], 0.25, sliding=9),
    "narrow values behind a cache": lambda q, k, v: reference.attend(q[:, :, -20:], k, v[..., :8], LENGTHS, 0.25),
    "soft cap": lambda *s: attention.prefill_attention(*s, 0.25, softcap=20.0),
    "sinks": lambda *s: attention.prefill_attention(*s, 0.25, sinks=torch.ones(H)),
    "sliding": lambda *s: attention.prefill_attention(*s, 0.25, sliding=9),
    "chunk": lambda *s: attention.prefill_attention(*s, 0.25, chunk=16),
    "bias": lambda *s: attention.prefill_attention(*s, 0.25, bias=BIAS),
    "lse": lambda *s: attention.prefill_attention_lse(*s, torch.tensor([[3, 9]]), 0.25)[0],
    "sparse": lambda *s: sparse.prefill_attention_sparse(
        *s, torch.arange(8).expand(B, K, 8), torch.tensor([T - 4]), 0.25, 4, 4, 12
    ),
    "behind a cache": lambda *s: reference.attend(s[0][:, :, -20:], *s[1:], LENGTHS, 0.25),
    "linear": lambda q, *_: linear.linear_rows(q, [states(33, D)], [None])[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_operator_multiplies_what_is_slow(call: Callable[..., Tensor]) -> None:
    """And each gives, in its dtype, what it gives in float32."""
    given = QUERY, KEY, VALUE
    with Products() as seen:
        found = call(*given)
    assert found.dtype == BF16
    assert {operand.dtype for operand in seen.operands} <= {torch.float32}
    exact = (
        call(*(each.float() for each in given))
        if call is not CALLS["linear"]
        else F.linear(QUERY.float(), states(33, D).float())
    )
    torch.testing.assert_close(found.float(), exact, atol=2e-3, rtol=2**-7)


def test_few_rows_are_not_worth_a_weight_in_float32() -> None:
    with Products() as seen:
        linear.linear_rows(states(linear.FEW, D), [states(33, D)], [None])
    assert {operand.dtype for operand in seen.operands} == {BF16}
