"""annotate: what it reads of each attention site, and what it refuses with the site's path."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graph_text import changes, check_count, short
from graphs import HANDLE, IDS, SNAPKV, SPECPC, State, check_contract, insert
from torch import fx
from traces import prompt_graph, step_graph

from specpass.errors import NoAttentionSiteError
from specpass.graph.aten import Sdpa
from specpass.graph.edit import copy_module
from specpass.graph.walk import ATEN
from specpass.passes.annotate import Annotate
from specpass.passes.facts import Inputs
from specpass.rewrite import Refusal
from specpass.rewrite.sites import Site, Sites


def described(site: Site) -> str:
    nodes = (site.cache, site.attention, site.query, site.key, site.value)
    numbers = (site.span, site.scale, site.softcap, site.budget)
    return f"{site.layer} {site.module}: {', '.join([*map(short, nodes), *map(str, numbers)])}"


def described_sites(state: State) -> str:
    return "\n".join(described(site) for site in state.facts[Sites].sites)


def test_text_of_the_sites() -> None:
    found = [
        prompt_graph(SNAPKV, mask=True, layers=2).after("annotate"),
        prompt_graph(SNAPKV, family="gemma2", sliding_window=512).after("annotate"),
        step_graph(SNAPKV).after("annotate"),
    ]
    assert_expected_inline(
        "\n\n".join(map(described_sites, found)),
        """\
0 model.layers.0.self_attn: fill, scaled_dot_product_attention, add, add, transpose, full attention, 0.25, 0.0, 24
1 model.layers.1.self_attn: fill, scaled_dot_product_attention, add, add, transpose, full attention, 0.25, 0.0, 24

0 model.layers.0.self_attn: fill, modified_attention, add, add, transpose, sliding window 512, 0.25, 50.0, 512

0 model.layers.0.self_attn: append_kv, scaled_dot_product_attention, add, view, view, full attention, 0.25, 0.0, 0""",
    )


def test_count_of_sites_is_that_of_layers_and_the_graph_stays() -> None:
    state = prompt_graph(SNAPKV, layers=2).before("annotate")
    before = copy_module(state.gm)
    assert len(state.apply(Annotate()).facts[Sites].sites) == 2
    assert changes(before, state.gm) == ""
    check_count(state.gm, scaled_dot_product_attention=2, fill=2)


def test_numbers_of_a_site_are_its_attention() -> None:
    """softmax(scale * q k^T) v of the nodes that were read is what the model computes."""
    state = prompt_graph(SNAPKV).after("annotate")
    site = state.facts[Sites].sites[0]
    state.returning(query=site.query, key=site.key, value=site.value, attention=site.attention)
    found = state.run(IDS, HANDLE)
    operands = (found["query"], found["key"], found["value"])
    expected = F.scaled_dot_product_attention(*operands, is_causal=True, scale=site.scale, enable_gqa=True)
    torch.testing.assert_close(found["attention"], expected)
    assert site.is_full


def attention_of(state: State) -> fx.Node:
    return Sdpa.find(state.gm.graph)[0].node


def refusal(state: State) -> str:
    with pytest.raises(Refusal) as caught:
        state.apply(Annotate())
    return str(caught.value)


def test_leaves_attention_over_something_that_is_not_cached() -> None:
    state = prompt_graph(SNAPKV).before("annotate")
    node = attention_of(state)
    query = Sdpa.of(node).query
    other = insert(state, ATEN.scaled_dot_product_attention, query, query, query, before=node)
    sites = state.apply(Annotate()).facts[Sites].sites
    assert [site.attention for site in sites] == [node]
    assert other in state.gm.graph.nodes


def test_leaves_a_model_whose_keys_or_values_change_behind_the_cache() -> None:
    for name in ("key", "value"):
        state = prompt_graph(SNAPKV).before("annotate")
        attention = Sdpa.of(attention_of(state))
        changed = insert(state, ATEN.cumsum.default, getattr(attention, name), 2, before=attention.node)
        attention.update(**{name: changed})
        assert refusal(state) == f"model.layers.0.self_attn: {name}s change between the cache and attention"


def test_leaves_a_model_whose_mask_or_dropout_is_not_understood() -> None:
    state = prompt_graph(SNAPKV, mask=True).before("annotate")
    state.facts.add(Inputs(None))
    assert refusal(state) == "model.layers.0.self_attn: attention mask: unknown: it is made of no token ids"
    state = prompt_graph(SNAPKV).before("annotate")
    Sdpa.of(attention_of(state)).update(is_causal=False)
    assert refusal(state) == "model.layers.0.self_attn: attention mask: none"
    state = prompt_graph(SNAPKV).before("annotate")
    Sdpa.of(attention_of(state)).update(dropout_p=0.1)
    assert refusal(state) == "model.layers.0.self_attn: attention dropout 0.1 is on"


def test_leaves_a_model_without_an_attention_site() -> None:
    state = prompt_graph(SNAPKV).before("annotate")
    node = attention_of(state)
    node.replace_all_uses_with(Sdpa.of(node).query)
    state.gm.graph.erase_node(node)
    with pytest.raises(NoAttentionSiteError, match="attn_implementation='sdpa'"):
        state.apply(Annotate())


def test_leaves_a_model_with_another_number_of_layers() -> None:
    state = prompt_graph(SNAPKV).before("annotate")
    with pytest.raises(Refusal, match=re.escape("the model has 3 layers and 1 recognised attention sites")):
        state.apply(Annotate(3))


def test_alone() -> None:
    state = check_contract(Annotate(), lambda: prompt_graph(SPECPC).before("annotate"))
    assert len(state.facts[Sites].sites) == 1
