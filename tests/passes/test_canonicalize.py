"""canonicalize: one spelling for attention, sizes and modes, with the same numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, MASK, SNAPKV, alone, assert_same, check_contract, small_graph
from traces import prompt_graph

from specpass.dialect.define import SPEC
from specpass.graph.edit import copy_module
from specpass.passes.canonicalize import Canonicalize

SDPA, MODIFIED = "scaled_dot_product_attention", "modified_attention"


def test_text_of_repeated_keys() -> None:
    state = prompt_graph(SNAPKV, mask=True).fresh()
    before = text(state.gm, SDPA, "_set_grad_enabled")
    after = text(state.apply(Canonicalize()).gm, SDPA, "_set_grad_enabled")
    assert_expected_inline(
        f"{before}\n->\n{after}",
        """\
_set_grad_enabled(False)
_set_grad_enabled(False)
scaled_dot_product_attention(add, reshape, reshape, expand, scale=0.25)
->
scaled_dot_product_attention(add, add, transpose, expand, scale=0.25, enable_gqa=True)""",
    )


def test_text_of_eager_attention() -> None:
    state = prompt_graph(SNAPKV, attention="eager").fresh()
    before = text(state.gm, "matmul", "softmax")
    after = text(state.apply(Canonicalize()).gm, SDPA)
    assert_expected_inline(
        f"{before}\n->\n{after}",
        """\
matmul(add, transpose)
softmax(add, -1, torch.float32)
matmul(dropout, reshape)
->
scaled_dot_product_attention(add, add, transpose, where, scale=0.25, enable_gqa=True)""",
    )


def test_text_of_capped_logits() -> None:
    state = prompt_graph(SNAPKV, family="gemma2", sliding_window=512).fresh().apply(Canonicalize())
    assert_expected_inline(
        text(state.gm, MODIFIED), """modified_attention(add, add, transpose, where, 0.25, 50.0, None)"""
    )


def test_count() -> None:
    plain = prompt_graph(SNAPKV, layers=2).fresh().apply(Canonicalize())
    check_count(plain.gm, ["_set_grad_enabled", "softmax"], scaled_dot_product_attention=2, fill=2)
    spelled = prompt_graph(SNAPKV, attention="eager", layers=2).fresh().apply(Canonicalize())
    check_count(spelled.gm, ["softmax"], scaled_dot_product_attention=2, fill=2)
    capped = prompt_graph(SNAPKV, family="gemma2", sliding_window=512, layers=2).fresh().apply(Canonicalize())
    check_count(capped.gm, ["softmax", SDPA], modified_attention=2, fill=2)


def test_numbers_stay() -> None:
    for options in ({"mask": True}, {"attention": "eager"}):
        state = prompt_graph(SNAPKV, **options).fresh()
        inputs = (IDS, HANDLE, MASK) if "mask" in options else (IDS, HANDLE)
        before = state.run(*inputs)
        assert_same(state.apply(Canonicalize()).run(*inputs), before)


def test_leaves_another_spelling_of_repeated_keys() -> None:
    """Heads in another order are another attention: [k0, k1, k0, k1], not [k0, k0, k1, k1]."""

    def tiled(query: Any, key: Any, value: Any) -> Any:
        return F.scaled_dot_product_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1))

    state = small_graph(tiled, torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8))
    traced = copy_module(state.gm)
    alone(Canonicalize(), state)
    assert changes(traced, state.gm) == ""


def test_leaves_a_softmax_that_is_no_attention() -> None:
    state = small_graph(lambda x: torch.softmax(x, -1) @ x, torch.zeros(2, 4, 6, 6))
    traced = copy_module(state.gm)
    alone(Canonicalize(), state)
    assert changes(traced, state.gm) == ""


def test_alone() -> None:
    state = check_contract(Canonicalize(), prompt_graph(SNAPKV, mask=True).fresh)
    assert not [node for node in state.gm.graph.nodes if node.target is SPEC.modified_attention.default]
