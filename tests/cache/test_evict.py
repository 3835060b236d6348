"""Generated tokens are bounded: slots, positions, what stays, against eager attention that masks the evicted ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounded_answers import rotated_apart, seen_by_step
from support import call, compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.cache.evict import Bound, drop
from specpass.cache.worth import POLICIES, worth
from specpass.observe.storage import cache_bytes

C, M, NEW = 24, 16, 60  # W = 4: eleven evictions
METHOD = specpass.StreamingLLM(budget=C)


def step(model: Any, cache: Any, token: int) -> Tensor:
    return call(model, torch.tensor([[token]]), cache)[0, -1]


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), METHOD, generated=M)


def decode_graphs(model: Any) -> int:
    return sum(graph.kind == "decode" for graph in specpass.report(model).graphs)


HERE = [policy for policy in POLICIES if policy not in ("triattention", "lookahead")]  # which have files of their own


@pytest.mark.parametrize(("policy", "shared"), [*((policy, False) for policy in HERE), ("rkv", True)])
def test_steps_are_attention_over_what_stays(model: Any, policy: str, shared: bool) -> None:
    """Slots and bytes are bounded, positions go on, one decode graph serves; logits are those of masked attention."""
    ids, graphs = prompt(40), decode_graphs(model)
    how: dict[str, Any] = {"generated": M, "evict": policy, "share_budget": shared}
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=NEW, **how)
    logits, masks, sizes, answer = [call(model, ids, cache)[0, -1]], [], set(), []
    for index in range(NEW):
        answer.append(int(logits[-1].argmax()))
        cache.reserve(1)
        shown = seen_by_step(cache, 40, 40 + index)
        masks.append([torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], 1) for mask in shown])
        logits.append(step(model, cache, answer[-1]))
        if index > M:
            sizes.add((cache.layers[0].slots, cache_bytes(cache), cache.layers[0].key_buffer.data_ptr()))
        assert (cache.layers[0].lengths <= C + M).all()
    assert len(sizes) == 1
    assert cache.get_seq_length() == 40 + NEW
    whole = torch.cat([ids, torch.tensor([answer])], 1)
    torch.testing.assert_close(torch.stack(logits[1:]), rotated_apart(tiny(), whole, masks, 40), atol=1e-4, rtol=1e-4)
    assert (cache.layers[0].positions >= 0).sum(-1).unique().tolist() != [C] or not shared
    newest = cache.layers[0].generated[0, 0]
    newest = newest[newest >= 0]
    assert newest.tolist() == sorted(set(newest.tolist()))
    assert newest[-4:].tolist() == list(range(NEW - 4, NEW))
    if policy == "recent":
        assert newest.tolist() == list(range(NEW - len(newest), NEW))
    assert decode_graphs(model) - graphs <= 1


def test_what_fits_is_generated_as_without_a_bound(model: Any) -> None:
    ids, mask = padded([prompt(50), prompt(30, seed=1)])
    ours = run(model, ids, M, mask)
    caches = specpass.BudgetCache(model.config, METHOD, max_new_tokens=M)
    assert ours.tokens == run(model, ids, M, mask, past_key_values=caches).tokens
    assert ours.cache.layers[0].generated is None
    assert "16 slots of each KV head" in str(specpass.report(model))
    assert specpass.report(model).data()["generated"] == {"slots": M, "policy": "recent", "shared": False}


def test_padded_rows_answer_as_they_do_alone(model: Any) -> None:
    """Rows whose prompts differ in length; beams, whose rows change places."""
    ids, mask = padded([prompt(50), prompt(12, seed=1)])
    together = run(model, ids, 40, mask)
    for row, own in enumerate((prompt(50), prompt(12, seed=1))):
        assert together.tokens[row] == run(model, own, 40).tokens[0]
    beams = model.generate(prompt(50), max_new_tokens=40, num_beams=3, do_sample=False)
    assert beams.shape == (1, 90)


def test_a_second_turn_longer_than_the_slots_comes_in_parts(model: Any) -> None:
    """Its logits are those of the same tokens one by one in the last of the parts' slots; crops reach the newest."""
    ids, more = prompt(40), prompt(30, seed=3)
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=4, generated=M)
    call(model, ids, cache)
    logits = call(model, more, cache, logits_to_keep=0)
    assert logits.shape[:2] == (1, 30)
    assert cache.get_seq_length() == 70
    assert (cache.layers[0].lengths <= C + M).all()
    cache.crop(2)
    assert cache.get_seq_length() == 68
    with pytest.raises(errors.CacheStateError, match=r"crop\(\d+\).*were evicted"):
        cache.crop(20)


def test_both_ways_keep_the_same_and_crops_forget_queries(model: Any) -> None:
    """A padded batch and a padded turn, by graphs and by the model's own forward; a copy goes on as the cache does."""
    ids, mask = padded([prompt(50), prompt(12, seed=1)])
    more, own = padded([prompt(9, seed=3), prompt(5, seed=4)])
    how: dict[str, Any] = {"generated": M, "evict": "rkv", "share_budget": True}
    found = []
    for target in (model, second_way(tiny(), METHOD)):
        cache = specpass.BudgetCache(target.config, METHOD, max_new_tokens=4, **how)
        first = run(target, ids, 30, mask, past_key_values=cache).tokens
        ones = torch.ones(2, 30, dtype=torch.int64)
        turn = torch.cat([ids, torch.tensor(first), more], 1), torch.cat([mask, ones, own], 1)
        tokens = run(target, turn[0], 20, turn[1], past_key_values=cache).tokens
        layer = cache.layers[0]
        assert (layer.lengths <= C + M).all()
        assert ((layer.positions >= 0).sum(-1) < C).any()
        assert (layer.generated[:, :, -1] == -1).all()
        newest, last = layer.queries.clone(), layer.lengths - layer.prompt_slots - 1
        found.append((first, tokens, layer.positions.clone(), layer.generated.clone()))
        cache.crop(1)
        assert torch.equal(layer.queries[:, :, 1:], newest[:, :, :-1])
        assert not layer.queries[:, :, 0].any()
        assert (layer.generated.gather(2, last[..., None]) == -1).all()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(*map(torch.as_tensor, (ours, theirs)))


def test_worth_is_the_papers() -> None:
    """Importance, redundancy and their mix, by loops over one head's slots."""
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 1, 12, 8), torch.randn(1, 2, 3, 8)
    keys[0, 0, 4] = 0  # of a token whose embedding is zeros
    inside, goes = torch.arange(12)[None, None] < 10, torch.arange(12)[None, None] < 7
    logits = queries[0] @ keys[0, 0, :7].T
    got = torch.cat([torch.stack([sum(head.softmax(-1)) / 3 for head in logits]).amax(0), torch.zeros(5)])
    mean = torch.cat([sum(row.softmax(0) for row in logits.amax(0)) / 3, torch.zeros(5)])
    important = torch.stack([mean[max(0, slot - 3) : slot + 4].max() for slot in range(12)])
    cosine = torch.stack(
        [
            sum(torch.cosine_similarity(keys[0, 0, slot], keys[0, 0, other], 0) for other in range(10) if other != slot)
            for slot in range(10)
        ]
    )
    alike = torch.cat([(cosine / 10).softmax(0), torch.zeros(2)])
    due = {"attention": got, "redundant": -alike, "rkv": 0.1 * important - 0.9 * alike}
    for policy, wanted in due.items():
        torch.testing.assert_close(worth(policy, keys, inside, goes, queries, 0.0, 0)[0, 0], wanted)
    nothing = worth("attention", keys, inside, goes, torch.zeros_like(queries), 0.0, 0)[0, 0, :7]
    assert (nothing == nothing[0]).all()


def test_windows_drop_what_nobody_reads() -> None:
    """A model with sliding layers: bounded by more than is written, and by less, where only they would lose tokens."""
    target = compile_eager(tiny("mistral-sliding", layers=1), METHOD)
    caches = [
        specpass.BudgetCache(target.config, METHOD, max_new_tokens=NEW, **({"generated": M} if bounded else {}))
        for bounded in (False, True)
    ]
    for ids in (prompt(40), prompt(9, seed=2)):
        for cache in caches:
            cache.reset()
        plain, bounded = (run(target, ids, NEW, past_key_values=cache) for cache in caches)
        assert plain.tokens == bounded.tokens
        assert bounded.cache.layers[0].slots == 24 + M


def test_dropping_keeps_order_and_spares_the_newest() -> None:
    score = torch.tensor([[[5.0, 1.0, 4.0, 0.0, 9.0, 9.0, 0.0, 0.0]]])
    goes = torch.arange(8)[None, None] < 4  # six in use, the newest two of which stay
    assert drop(score, torch.tensor([[2]]), goes).tolist() == [[[0, 2, 4, 5, 6, 7, 1, 3]]]
    assert drop(score, torch.tensor([[0]]), goes).tolist() == [[list(range(8))]]
    assert (Bound(512).window, Bound(512).kept(1), Bound(512).most) == (32, 448, 480)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"generated": 4}, "generated=4: expected"),
        ({"generated": True}, "generated=True"),
        ({"generated": 64, "evict": "oldest"}, "evict='oldest': expected one of"),
        ({"evict": "random"}, "generated=None sets no such number"),
        ({"share_budget": True}, "share_budget=True says what"),
        ({"generated": 64, "share_budget": True, "cache_bits": 4}, "share_budget=True with cache_bits=4"),
    ],
)
def test_bounds_that_there_are_not(given: dict[str, Any], text: str) -> None:
    target = tiny(layers=1)
    for make in (
        lambda: specpass.compile(target, method=METHOD, **given),
        lambda: specpass.BudgetCache(target.config, METHOD, **given),
    ):
        with pytest.raises(errors.GeneratedError, match=text):
            make()


def test_what_does_not_go_with_a_bound(model: Any) -> None:
    how = specpass.SpecKV(budget=C, window=8, lookahead=14)
    with pytest.raises(errors.GeneratedError, match="lookahead of 14 tokens"):
        specpass.BudgetCache(model.config, how, generated=M)
    target = tiny(layers=1)
    with pytest.raises(errors.SpeculationError, match=r"speculate=2 .* generated=16"):
        specpass.compile(target, draft=tiny(seed=1), method=how, speculate=2, generated=M)
    with pytest.raises(errors.GeneratedError, match="assisted decoding"):
        model.generate(prompt(40), max_new_tokens=4, prompt_lookup_num_tokens=2)
    spread = specpass.SnapKV(budget=C, window=8, spread="heads")
    with pytest.raises(errors.GeneratedError, match="share_budget=True with spread='heads'"):
        compile_eager(tiny(layers=1), spread, generated=M, share_budget=True)
    with pytest.raises(errors.GeneratedError, match=r"evict='rkv': attention of layers\.0 reads what is made"):
        Bound(M, "rkv").check_asks(["layers.0"])
    Bound(M, "redundant").check_asks(["layers.0"])
    biased = compile_eager(tiny("bloom", layers=1), METHOD, generated=M)
    with pytest.raises(errors.GeneratedError, match="ALiBi"):
        run(biased, prompt(40), 2)
