"""evict="triattention": against the paper's formula on queries and keys as they were before they were rotated."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import pytest
import torch
import traces
from graphs import SNAPKV
from hypothesis import given, settings
from hypothesis import strategies as st
from support import compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.benchmarks.coverage.tiny import SIZES, tiny_model
from specpass.cache import budget
from specpass.cache.evict import Bound
from specpass.cache.worth import worth
from specpass.capture.rope import why_not_fixed
from specpass.passes.facts import RotationAsked
from specpass.rewrite.sites import Rotation, Sites

C, M, W = 12, 16, 4
METHOD = specpass.StreamingLLM(budget=C)
HOW: dict[str, Any] = {"generated": M, "evict": "triattention"}
Pairs = list[tuple[int, int]]


def paper(queries: Tensor, keys: Tensor, places: Tensor, now: int, pairs: Pairs, omega: list[float]) -> Tensor:
    """[G, n] float64: S of keys [n, D] that stood at places [n], both as they were before they were rotated.

    Args: queries [G, W, D]; now: the next token's position. arXiv 2604.04921: the trigonometric series, the norms that
    it weighs by 1 - R_f, and the mean over geometric offsets, all spelled out.
    """
    turning = {dim for pair in pairs for dim in pair}
    still = [dim for dim in range(keys.shape[1]) if dim not in turning]
    score = queries[..., still].mean(1) @ keys[:, still].T
    for head, own in enumerate(queries):
        for (first, second), speed in zip(pairs, omega, strict=True):
            asked = torch.complex(own[:, first], own[:, second])
            stored = torch.complex(keys[:, first], keys[:, second])
            centre, expected = asked.mean(), asked.abs().mean()
            resultant = centre.abs() / expected if expected else torch.tensor(0.0)
            angle = centre.angle() - stored.angle()
            series = [
                centre.abs() * stored.abs() * torch.cos(speed * (now - places + 2**power) + angle)
                for power in range(17)
            ]
            score[head] += torch.stack(series).mean(0) + (1 - resultant) * expected * stored.abs()
    return score


def standard(score: Tensor) -> Tensor:
    """[n] of scores [G, n]: each head's standardised, the most over the heads of a group."""
    return ((score - score.mean(1, keepdim=True)) / score.std(1, unbiased=False, keepdim=True)).amax(0)


def turned(states: Tensor, places: Tensor, pairs: Pairs, omega: list[float]) -> Tensor:
    """States [..., n, D] that stand at places [n], rotated."""
    out = states.clone()
    for (first, second), speed in zip(pairs, omega, strict=True):
        cos, sin = torch.cos(speed * places), torch.sin(speed * places)
        out[..., first] = states[..., first] * cos - states[..., second] * sin
        out[..., second] = states[..., second] * cos + states[..., first] * sin
    return out


STYLES: dict[str, Pairs] = {
    "halves": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "neighbours": [(0, 1), (2, 3), (4, 5), (6, 7)],
    "partial": [(2, 3), (6, 7)],
    "none": [],
}


def drawn(style: str, seed: int, start: int, newest: int = 6, slots: int = 14) -> tuple[Any, ...]:
    """Of one row: stored keys [1, 2, P, 8], queries [1, 4, W, 8], the rotation, and what both were before."""
    generator = torch.Generator().manual_seed(seed)
    pairs, dice = STYLES[style], lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    omega = [10.0 ** (-2.0 * index / len(pairs)) for index in range(len(pairs))]
    keys, queries = dice(1, 2, slots, 8), dice(1, 4, newest, 8) + 2 * dice(1, 4, 1, 8)
    places = start + torch.randperm(60, generator=generator)[:slots].sort().values
    now = int(places[-1]) + 1
    told = torch.arange(now - newest, now)
    rotation = Rotation(*(tuple(pair[part] for pair in pairs) for part in (0, 1)), tuple(omega))
    before = keys, queries, places, now, pairs, omega
    return turned(keys, places, pairs, omega).float(), turned(queries, told, pairs, omega).float(), rotation, before


def scores(keys: Tensor, queries: Tensor, rotation: Rotation, goes: Tensor) -> Tensor:
    return worth("triattention", keys, torch.ones_like(goes), goes, queries, 0.0, 0, rotation)


@pytest.mark.parametrize("style", STYLES)
def test_scores_are_the_papers(style: str) -> None:
    stored, asked, rotation, (keys, queries, *rest) = drawn(style, 1, 100)
    places, (now, pairs, omega) = rest[0], rest[1:]
    goes = (torch.arange(14) < 10).expand(1, 2, -1)
    ours = scores(stored, asked, rotation, goes)
    for head in range(2):
        due = standard(paper(queries[0, 2 * head : 2 * head + 2], keys[0, head, :10], places[:10], now, pairs, omega))
        torch.testing.assert_close(ours[0, head, :10].double(), due, atol=1e-3, rtol=1e-3)
    none = torch.zeros_like(asked)
    assert not scores(stored, none, rotation, goes).any()
    fewer = torch.cat([none[:, :, :4], asked[:, :, 4:]], 2)  # rows without a query change nothing but a factor
    torch.testing.assert_close(
        scores(stored, fewer, rotation, goes), scores(stored, asked[:, :, 4:], rotation, goes), atol=1e-4, rtol=1e-4
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(STYLES)), st.integers(0, 99), st.integers(1, 30_000))
def test_where_all_stands_changes_nothing(style: str, seed: int, shift: int) -> None:
    goes = torch.ones(1, 2, 14, dtype=torch.bool)
    here, there = (scores(*drawn(style, seed, start)[:3], goes) for start in (0, shift))
    torch.testing.assert_close(here, there, atol=2e-3, rtol=2e-3)


@dataclasses.dataclass
class Eviction:
    """What a layer held in front of an eviction, and which positions and numbers it holds behind it."""

    keys: Tensor
    queries: Tensor
    slots: Tensor  # of the prompt
    appended: int
    before: tuple[Tensor, Tensor]  # positions, numbers
    after: tuple[Tensor, Tensor]

    def places(self, row: int, head: int, length: int, held: tuple[Tensor, Tensor]) -> Tensor:
        """Positions of the slots in use, of a row whose prompt has so many tokens."""
        own, told = (part[row, head] for part in held)
        return torch.cat([own[own >= 0], length + told[told >= 0]])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Eviction]:
    """Evictions from here on."""
    found: list[Eviction] = []

    def recorded(layer: Any, bound: Bound, kept: int, seed: int) -> None:
        numbers, slot = layer.generated, torch.arange(M)
        if numbers is None:
            numbers = slot.masked_fill(slot >= (layer.lengths - layer.prompt_slots)[..., None], -1)
        held = layer.keys.clone(), layer.queries.clone(), layer.prompt_slots.clone(), layer.cache.appended
        before = layer.positions.clone(), numbers.clone()
        evict(layer, bound, kept, seed)
        found.append(Eviction(*held, before, (layer.positions.clone(), layer.generated.clone())))

    evict = budget.evict
    monkeypatch.setattr(budget, "evict", recorded)
    return found


def by_model(model: Any, states: Tensor, places: Tensor, back: bool = False) -> Tensor:
    """States [h, n, D] that stand at places [n], turned (back) by the model's own embedding and function."""
    apply = sys.modules[type(model.model.layers[0].self_attn).__module__].apply_rotary_pos_emb
    cos, sin = model.model.rotary_emb(states.float(), places[None])
    part = states[None, ..., : cos.shape[-1]].float()
    return torch.cat([apply(part, part, cos, -sin if back else sin)[0][0], states[..., cos.shape[-1] :]], -1).double()


FAMILIES: dict[str, Pairs] = {  # of 16 dimensions
    "llama": [(dim, dim + 8) for dim in range(8)],
    "cohere": [(dim, dim + 1) for dim in range(0, 16, 2)],
    "stablelm": [(0, 2), (1, 3)],
}


def speeds(model: Any, pairs: Pairs) -> list[float]:
    return [model.config.rope_parameters["rope_theta"] ** (-index / len(pairs)) for index in range(len(pairs))]


@pytest.mark.parametrize("family", ["cohere", "stablelm"])
def test_models_that_pair_neighbours_and_turn_in_part(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a traced graph says, keys and queries that the model's own code rotated score as they did before."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 1)
    monkeypatch.setattr(traces, "tiny", lambda name, **_: tiny_model(name))
    traced = traces.prompt_graph(SNAPKV, positions=True, family=family)
    state = traced.fresh()
    state.facts.add(RotationAsked(1024))
    (site,) = state.apply(*traced.passes[:2]).facts[Sites].sites
    model, pairs, goes = tiny_model(family), FAMILIES[family], torch.ones(1, 2, 20, dtype=torch.bool)
    places, queries, keys = torch.arange(3, 63, 3), torch.randn(4, 8, 16).double() + 1, torch.randn(2, 20, 16).double()
    stored, asked = by_model(model, keys, places), by_model(model, queries, torch.arange(55, 63))
    ours = scores(stored[None].float(), asked[None].float(), site.rotation, goes)[0]
    for head in range(2):
        due = paper(queries[2 * head : 2 * head + 2], keys[head], places, 63, pairs, speeds(model, pairs))
        torch.testing.assert_close(ours[head].double(), standard(due), atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(layers=1), METHOD, **HOW)


@pytest.mark.parametrize("shared", [False, True])
def test_what_stays_scores_most(model: Any, shared: bool, seen: list[Eviction]) -> None:
    """A padded batch, groups of two heads, two evictions of one layer, one decode graph."""
    pairs, lengths = FAMILIES["llama"], (20, 15)
    ids, mask = padded([prompt(20), prompt(15, seed=1)])
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=28, share_budget=shared, **HOW)
    run(model, ids, 28, mask, past_key_values=cache)
    omega = speeds(model, pairs)
    assert [graph.kind for graph in specpass.report(model).graphs] == ["prefill", "decode"]
    assert len(seen) == 2
    for event, row, head in itertools.product(seen, range(2), range(2)):
        now = lengths[row] + event.appended
        places = event.places(row, head, lengths[row], event.before)
        chosen = slice(0 if shared else int(event.slots[row, head]), len(places) - W)
        keys = by_model(model, event.keys[row, [head], : len(places)], places, back=True)[0]
        queries = by_model(model, event.queries[row].unflatten(0, (2, 2))[head], torch.arange(now - M, now), back=True)
        score = standard(paper(queries, keys[chosen], places[chosen], now, pairs, omega))
        stays = torch.isin(places, event.places(row, head, lengths[row], event.after))
        gone = ~stays[chosen]
        assert (~stays).sum() == gone.sum() == 8
        assert score[gone].max() < score[~gone].min() + 1e-3
        assert score[gone].max() < score[~gone].max() - 0.1


def test_models_whose_rotation_is_not_known() -> None:
    """Learned positions; frequencies that follow the length. Nothing was read then."""
    model = compile_eager(tiny("gpt2", layers=1), METHOD, **HOW)
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=4, **HOW)
    with pytest.raises(errors.GeneratedError, match=r"this gpt2 \(nothing turns the queries.*use evict='attention'"):
        run(model, prompt(20), 4, past_key_values=cache)
    assert not cache.filled
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(errors.GeneratedError, match=r"this llama \(its own forward runs.*'dynamic'"):
        run(compile_eager(tiny(layers=1, rope_parameters=dynamic), METHOD, **HOW), prompt(20), 4)
    config = tiny(layers=1).config
    assert why_not_fixed(config) == ""
    for said in ({"rope_type": "longrope"}, {"full_attention": {"rope_type": "longrope"}}, {"type": "longrope"}):
        config.rope_parameters = said
        with pytest.raises(errors.GeneratedError, match="follow the length: rope_type longrope"):
            Bound(M, "triattention").check_turns("phi3", {}, why_not_fixed(config))


def test_what_else_is_refused() -> None:
    with pytest.raises(errors.GeneratedError, match="its own forward runs, and no graph says it: a test says so"):
        run(second_way(tiny(layers=1), METHOD, **HOW), prompt(20), 4)
    with pytest.raises(errors.GeneratedError, match=r"evict='triattention': attention of layers\.0 reads what is made"):
        Bound(M, "triattention").check_asks(["layers.0"])
    bound = Bound(M, "triattention")
    with pytest.raises(errors.GeneratedError, match=r"this x \(layer 1: no pairs\)"):
        bound.check_turns("x", {"layer 0": Rotation((0,), (1,), (1.0,)), "layer 1": "no pairs"})
    bound.check_turns("x", {"layer 0": Rotation((0,), (1,), (1.0,)), "layer 1": Rotation(), "layer 2": None})
    Bound(M, "attention").check_turns("x", {"layer 1": "no pairs"})
    assert (Bound(M).noted, bound.noted, Bound(512, "triattention").noted) == (4, 16, 128)
