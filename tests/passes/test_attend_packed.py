"""attend_packed: attention without a mask, which a prompt without padding does not notice."""

from __future__ import annotations

from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, SNAPKV, assert_same, check_contract, insert
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.attend_packed import AttendPacked
from specpass.rewrite.sites import Sites

SDPA = "scaled_dot_product_attention"


def test_text() -> None:
    state = prompt_graph(SNAPKV).before("attend_packed")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(AttendPacked()).gm),
        """\
-scaled_dot_product_attention(add, add, transpose, None, 0.0, True, scale=0.25, enable_gqa=True)
-reshape(scaled_dot_product_attention, [sym_size, -1, sym_size, 16])
+prefill_attention(add, add, transpose, 0.25)
+reshape(prefill_attention, [sym_size, -1, sym_size, 16])""",
    )


def test_text_of_capped_logits() -> None:
    state = prompt_graph(SNAPKV, family="gemma2", layer_types=("full_attention",)).after("attend_packed")
    assert_expected_inline(
        text(state.gm, "prefill_attention", "modified_attention"),
        """prefill_attention(add, add, transpose, 0.25, 50.0, None)""",
    )


def test_count() -> None:
    state = prompt_graph(SNAPKV, mask=True, layers=2).after("attend_packed")
    masks = ["le", "__and__", "bitwise_and", "new_ones"]
    check_count(state.gm, [SDPA, *masks], prefill_attention=2, fill=2)
    mask = state.gm.graph.find_nodes(op="placeholder")[2]
    assert (mask.target, len(mask.users)) == ("attention_mask", 0)


def test_numbers_stay() -> None:
    for config in ({}, {"family": "gemma2", "layer_types": ("full_attention",)}):
        state = prompt_graph(SNAPKV, **config).before("attend_packed")
        before = state.run(IDS, HANDLE)
        assert_same(state.apply(AttendPacked()).run(IDS, HANDLE), before)


def test_leaves_attention_that_is_no_site() -> None:
    """Attention over something that is not cached may see what it likes."""
    state = prompt_graph(SNAPKV).before("attend_packed")
    site = state.facts[Sites].sites[0]
    other = insert(state, ATEN.scaled_dot_product_attention, site.query, site.query, site.query, before=site.attention)
    state.returning(other=other).apply(AttendPacked())
    assert_expected_inline(
        text(state.gm, SDPA, "prefill_attention"),
        """\
scaled_dot_product_attention(add, add, add)
prefill_attention(add, add, transpose, 0.25)""",
    )


def test_alone() -> None:
    state = check_contract(AttendPacked(), lambda: prompt_graph(SNAPKV, mask=True).before("attend_packed"))
    assert [site.attention.target.name() for site in state.facts[Sites].sites] == ["specpass::prefill_attention"]
