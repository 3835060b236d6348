"""Two operators become one where the second can use the first's work: when, when not, and with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import kept, run
from tiny import prompt, tiny
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import specpass
import specpass.ops
from specpass.dialect.define import SPEC
from specpass.graph.walk import find
from specpass.kernels import dispatch
from specpass.kernels.dispatch import Choice
from specpass.lowering import fuse_append
from specpass.lowering.choose import choose_sites
from specpass.lowering.fuse import FUSION
from specpass.rewrite import Facts, Request

pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
B, H, K, T, R, P, W, D = 2, 8, 2, 60, 12, 84, 4, 64


@pytest.fixture
def fused_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says kernel for CPU tensors; the operator itself still runs its reference there."""
    monkeypatch.setattr(fuse_append, "choose", lambda operator, operands: Choice(operator, "decode_append", "a test"))


def prefill(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def step(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    return SPEC.attend(query, *(states.unflatten(1, (K, -1)) for states in (keys, values)), used, 0.1)


def inputs(of: Callable[..., Any], device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    if of is prefill:
        query, key, value = (torch.randn(B, T, heads, D, **make).transpose(1, 2) for heads in (H, K, K))
        rows = torch.full((B, R), 1, device=device).cumsum(1) + (T - R - 1)
        return query, key, value, rows, torch.full((B,), T - R + W, device=device)
    storage = tuple(torch.randn(B, K * P, D, **make) for _ in range(2))
    return (
        *storage,
        torch.full((B, K), 20, device=device),
        *(torch.randn(B, heads, 1, D, **make) for heads in (H, K, K)),
    )


def traced(
    of: Callable[..., Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    function: Callable[..., Any] | None = None,
) -> fx.GraphModule:
    """The graph of `function` (`of` itself) on fake inputs of `of`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function or of, pre_dispatch=True)(*inputs(of, device, dtype))


def fuse(gm: fx.GraphModule) -> None:
    """Both passes, alone: these graphs are parts of a layer, no stage of a model's."""
    for item in FUSION:
        item.run(gm, Request("decode"), Facts())
    gm.graph.lint()


def text(gm: fx.GraphModule) -> str:
    """Calls of specpass's operators, one a line."""
    return "\n".join(
        f"{node.name} = {node.target}{node.args}" for node in gm.graph.nodes if str(node.target).startswith("specpass")
    )


def test_attention_hands_its_log_sum_exp_to_importance() -> None:
    gm = traced(prefill, "cuda")
    fuse(gm)
    assert_expected_inline(
        text(gm),
        """\
prefill_attention_lse_default = specpass.prefill_attention_lse.default(query_1, key_1, value_1, rows_1, 0.1)
take_rows = specpass.take_rows.default(query_1, rows_1)
importance = specpass.importance.default(take_rows, key_1, rows_1, lengths_1, 4, 0.1, 'max', None, getitem_1)""",
    )
    assert [str(choice) for _, choice in choose_sites(gm)] == [
        "prefill_attention_lse: aten (torch's flash attention, whose log-sum-exp saves importance its first pass over "
        "K)",
        "importance: kernel importance_given_lse (shapes are supported)",
    ]
    out, lse = find(gm.graph, SPEC.prefill_attention_lse)[0].meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((B, H, T, D), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((B, H, R), torch.float32, "cuda")


def test_a_decode_step_writes_and_attends_in_one_launch() -> None:
    gm = traced(step, "cuda")
    fuse(gm)
    assert text(gm) == (
        "append_attend_default = specpass.append_attend.default(keys_1, values_1, used_1, query_1, key_1, value_1, "
        "0.1, 0.0, None)"
    )
    assert [str(choice) for _, choice in choose_sites(gm)] == [
        "append_attend: kernel decode_append (shapes are supported)"
    ]
    out = find(gm.graph, SPEC.append_attend)[0].meta["val"]
    assert (out.shape, out.dtype, out.device.type) == ((B, H, 1, D), torch.bfloat16, "cuda")


@pytest.mark.parametrize("of", [prefill, step])
def test_numbers_stay(of: Callable[..., Any], fused_appends: None) -> None:
    torch.manual_seed(0)
    gm, given = traced(of, dtype=torch.float32), inputs(of, dtype=torch.float32)
    mine, theirs = (tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in given) for _ in range(2))
    expected = gm(*theirs)
    fuse(gm)
    gm.recompile()
    torch.testing.assert_close(gm(*mine), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):  # what is written in place
        assert torch.equal(one, other)


def other_key(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key + 1, rows, lengths, W, 0.1, "max")


def other_scale(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.2)
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def late_rows(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    out = SPEC.prefill_attention(query, key, value, 0.1)
    rows = rows + 0
    return out, SPEC.importance(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.1, "max")


def wide_values(query: Any, key: Any, value: Any, rows: Any, lengths: Any) -> Any:
    return prefill(query, key, torch.cat([value, value], -1), rows, lengths)


@pytest.mark.parametrize("function", [other_key, other_scale, late_rows, wide_values])
def test_importance_of_something_else_stands_alone(function: Callable[..., Any]) -> None:
    gm = traced(prefill, "cuda", function=function)
    before = text(gm)
    fuse(gm)
    assert text(gm) == before


def test_attention_that_aten_does_not_flash_gives_no_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = traced(prefill, "cuda", torch.float32)
    fuse(gm)
    assert find(gm.graph, SPEC.prefill_attention)
    for arch, flash in (("sm_75", False), ("gfx942", False), ("sm_90", True)):
        monkeypatch.setattr(dispatch, "device_arch", lambda index, arch=arch: arch)
        gm = traced(prefill, "cuda")
        fuse(gm)
        assert bool(find(gm.graph, SPEC.prefill_attention_lse)) == flash


def read_between(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    seen = keys.view(B, K, P, D).sum(2)
    slots = (states.unflatten(1, (K, -1)) for states in (keys, values))
    return seen, SPEC.attend(query, *slots, used, 0.1)


def other_storage(keys: Any, values: Any, used: Any, query: Any, key: Any, value: Any) -> Any:
    SPEC.append_kv(keys, values, used, key, value, None)
    return SPEC.attend(query, *(states.unflatten(1, (K, -1)) for states in (values, keys)), used, 0.1)


@pytest.mark.parametrize("function", [read_between, other_storage])
def test_an_append_that_others_read_stays(function: Callable[..., Any]) -> None:
    gm = traced(step, "cuda", function=function)
    before = text(gm)
    fuse(gm)
    assert text(gm) == before


def test_on_the_cpu_appends_stay_with_aten() -> None:
    gm = traced(step)
    fuse(gm)
    assert find(gm.graph, SPEC.append_kv)


METHODS = [
    (specpass.SpecKV(budget=24, window=8, lookahead=4), "inductor"),
    (specpass.SpecPC(24, window=8, lookahead=3), "eager"),
]


@pytest.mark.parametrize(("method", "lowering"), METHODS, ids=["SpecKV", "SpecPC"])
def test_generation_does_not_notice(method: Any, lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Target and draft, prefill and steps: the same tokens, kept positions and caches as with nothing fused."""
    ids = prompt(60, seed=1)

    def generate(how: str) -> Any:
        torch._dynamo.reset()
        model = specpass.compile(tiny(layers=1), draft=tiny(seed=1, layers=1), method=method, lowering=how)
        found = run(model, ids, 6)
        return found, [str(choice) for record in specpass.report(model).graphs for _, choice in record.choices]

    with monkeypatch.context() as patch:
        patch.setattr("specpass.lowering.lower.fuse", lambda *_: {})
        theirs, plain = generate("eager")
    monkeypatch.setattr(fuse_append, "choose", lambda operator, operands: Choice(operator, "decode_append", "a test"))
    ours, names = generate(lowering)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    for mine, other in zip(kept(ours.cache), kept(theirs.cache), strict=True):
        assert torch.equal(mine, other)
    assert any("append_attend" in name for name in names)
    assert not any("append_attend" in name or "_lse" in name for name in plain)
