"""Turns with dropped="host" keep, answer and hold what a prompt of the whole conversation would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import Run, call, check_answer, check_same, check_selection, compile_eager, kept, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import specpass
from specpass import errors
from specpass.backend.turns import own_mask
from specpass.cache.conversation import Conversation
from specpass.cache.identity import Identity
from specpass.observe.storage import cache_bytes
from specpass.testing import eager

HOST = {"dropped": "host"}
METHODS = {
    "speckv": specpass.SpecKV(budget=24, window=8, lookahead=5),
    "ngram": specpass.SpecKV(budget=24, window=8, lookahead="ngram"),
    "snapkv": specpass.SnapKV(budget=24, window=8),
    "streamingllm": specpass.StreamingLLM(budget=24),
    "pyramidkv": specpass.PyramidKV(budget=24, window=8),
}
FIRST, NEW = prompt(60), 8
QUESTIONS = [prompt(11, seed=1), prompt(3, seed=2)]  # the second is shorter than the window


def host_cache(model: Any, method: Any, **given: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, **given, **HOST)


def following(ids: Tensor, answer: Run, question: Tensor) -> Tensor:
    return torch.cat([ids, torch.tensor(answer.tokens), question], 1)


def converse(model: Any, reference: Any) -> tuple[Run, Tensor]:
    """Three turns of a model that holds what it drops, each against a prompt of the whole conversation."""
    ids, ours = FIRST, run(model, FIRST, NEW)
    check_same(run(reference, ids, NEW), ours)
    for question in QUESTIONS:
        ids = following(ids, ours, question)
        ours = run(model, ids, NEW, past_key_values=ours.cache)
        check_same(run(reference, ids, NEW), ours)
    return ours, ids


@pytest.fixture(scope="module")
def model() -> Any:
    """Its own draft, so that answers follow the lookahead."""
    return compile_eager(tiny(), METHODS["speckv"], tiny(), **HOST)


@pytest.fixture(scope="module")
def reference() -> Any:
    return second_way(tiny(), METHODS["snapkv"])


def test_each_turn_is_a_prompt_of_the_whole_conversation(model: Any) -> None:
    """Against fresh prompts, and against plain formulas and plain attention over what is kept."""
    report = specpass.report(model)
    ours, ids = converse(model, model)
    graphs, free = len(report.graphs), report.replayed
    cache, tokens = ours.cache, 60 + NEW + 11 + NEW + 3
    assert int(cache.get_seq_length()) == tokens + NEW - 1
    rows, valid = eager.draft_lookahead(tiny(), ids, 5, 0)
    assert torch.equal(cache.lookahead_ids, rows)
    check_selection(kept(cache), eager.select(tiny(), ids, 24, rows[:, :valid], eager.Scoring(window=8)), 8)
    check_answer(ours, tiny(), ids, kept(cache))
    assert cache_bytes(cache) == cache_bytes(run(model, FIRST).cache), "on the device there is the budget"
    assert cache.host_bytes == 2 * 2 * 2 * 2 * 128 * 16 * 4  # models, layers, K and V, heads, tokens in 64s, D, float32
    run(model, following(ids, ours, prompt(20)), NEW, past_key_values=cache)
    assert f"keys and values of {tokens + NEW + 20} tokens lie in host memory, 0.1 MiB" in str(report)
    assert report.data()["held"] == {"rows": 1, "tokens": 118, "target_bytes": 65536, "draft_bytes": 65536}
    assert len(report.graphs) == graphs, "turns of any length share the steps' graphs"
    assert report.replayed > free > 0


@pytest.mark.parametrize("name", ["ngram", "snapkv", "streamingllm", "pyramidkv"])
def test_methods(name: str) -> None:
    converse(second_way(tiny(), METHODS[name], **HOST), second_way(tiny(), METHODS[name]))


@pytest.mark.parametrize("family", ["mistral-sliding", "llama4", "gpt2"])
def test_families(family: str) -> None:
    converse(second_way(tiny(family), METHODS["snapkv"], **HOST), second_way(tiny(family), METHODS["snapkv"]))


def test_what_fits_the_budget_is_the_plain_models() -> None:
    model, plain = second_way(tiny(), specpass.SnapKV(budget=128, window=8), **HOST), tiny()
    ids, cache, theirs = FIRST, None, DynamicCache(config=plain.config)
    for question in [*QUESTIONS, prompt(2)]:
        given = {} if cache is None else {"past_key_values": cache}
        ours = run(model, ids, **given)
        assert ours.tokens == run(plain, ids, past_key_values=theirs).tokens
        ids, cache = following(ids, ours, question), ours.cache


def test_rows_of_a_batch_are_those_of_the_row_alone() -> None:
    """Padded prompts and padded turns, of which some rows read more than others."""
    model = second_way(tiny(), METHODS["speckv"], tiny(seed=1000), **HOST)
    turns = [[prompt(50), prompt(12, seed=4), prompt(1, seed=5)], [prompt(4, seed=6), prompt(30, seed=7), prompt(1)]]
    ids, mask = padded(turns[0])
    together = run(model, ids, mask=mask)
    alone = [run(model, own) for own in turns[0]]
    for row, own in enumerate(alone):
        check_same(own, together, row)
    more, own_columns = padded(turns[1])
    ones = torch.ones(3, 6, dtype=torch.int64)
    ids = torch.cat([ids, torch.tensor(together.tokens), more], 1)
    mask = torch.cat([mask, ones, own_columns], 1)
    second = run(model, ids, mask=mask, past_key_values=together.cache)
    for row, (first, own) in enumerate(zip(turns[0], alone, strict=True)):
        whole = following(first, own, turns[1][row])
        check_same(run(model, whole, past_key_values=own.cache), second, row)
        check_same(run(model, whole), second, row)


def test_crops_copies_and_rows_that_change_places(reference: Any) -> None:
    model = second_way(tiny(), METHODS["snapkv"], **HOST)
    ids = torch.cat([FIRST, prompt(60, seed=8)])
    ours = run(model, ids)
    ours.cache.crop(3)
    ours.cache.reorder_cache(torch.tensor([1, 0]))
    twin = copy.deepcopy(ours.cache)
    whole = torch.cat([ids, torch.tensor(ours.tokens)[:, :2]], 1)[[1, 0]]
    for cache, question in ((ours.cache, prompt(9, batch=2, seed=3)), (twin, prompt(14, batch=2, seed=4))):
        both = torch.cat([whole, question], 1)
        second = run(model, both, past_key_values=cache)
        for row in range(2):
            check_same(run(reference, both[[row]]), second, row)
    ours.cache.batch_select_indices(torch.tensor([1]))
    third = torch.cat([whole[[1]], prompt(9, batch=2, seed=3)[[1]]], 1)
    third = torch.cat([third, torch.tensor(run(reference, third).tokens), prompt(4)], 1)
    check_same(run(reference, third), run(model, third, past_key_values=ours.cache))


def test_beams(reference: Any) -> None:
    """Their rows change places at each token; the turn behind the best one's answer goes on from all of them."""
    model, how = second_way(tiny(), METHODS["snapkv"], **HOST), {"max_new_tokens": 5, "num_beams": 2}
    cache = host_cache(model, METHODS["snapkv"], max_new_tokens=5)
    ones = torch.ones_like(FIRST)
    found = model.generate(FIRST, attention_mask=ones, past_key_values=cache, **how)
    assert torch.equal(found, reference.generate(FIRST, attention_mask=ones, **how))
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(4)
    whole = torch.cat([FIRST, prompt(9, seed=3)], 1)
    check_same(run(reference, whole), run(model, whole, past_key_values=cache))


def test_direct_calls(reference: Any) -> None:
    model = second_way(tiny(), METHODS["snapkv"], **HOST)
    cache, whole = host_cache(model, METHODS["snapkv"]), specpass.BudgetCache(model.config, METHODS["snapkv"])
    call(model, FIRST, cache)
    call(model, torch.tensor([[7]]), cache)
    logits = call(model, QUESTIONS[0], cache, logits_to_keep=0)
    both = torch.cat([FIRST, torch.tensor([[7]]), QUESTIONS[0]], 1)
    expected = call(reference, both, whole, logits_to_keep=0)[:, -11:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    cache.reset()
    assert cache.host_bytes == 0
    torch.testing.assert_close(call(model, FIRST, cache), call(model, FIRST, host_cache(model, METHODS["snapkv"])))


def test_behind_a_prefix(reference: Any) -> None:
    """The document is read once, and every turn chooses among it and the conversation."""
    model = second_way(tiny(), METHODS["snapkv"], **HOST)
    prefix, ids = specpass.read(model, FIRST), QUESTIONS[0]
    ours = run(model, ids, prefix=prefix)
    check_same(run(reference, torch.cat([FIRST, ids], 1)), ours)
    for question in (QUESTIONS[1], prompt(9, seed=3)):
        ids = following(ids, ours, question)
        ours = run(model, ids, past_key_values=ours.cache, prefix=prefix)
        check_same(run(reference, torch.cat([FIRST, ids], 1)), ours)
    assert int(ours.cache.get_seq_length()) == ids.shape[1] + 5
    with pytest.raises(errors.PrefixCacheError, match="another prefix"):
        run(model, following(ids, ours, prompt(2)), past_key_values=ours.cache, prefix=specpass.read(model, prompt(9)))
    with pytest.raises(errors.UnsupportedCallError, match=r"prefix=Tensor: expected"):
        run(model, ids, prefix=ids)


def test_an_answer_that_is_bounded_is_read_again_whole(reference: Any) -> None:
    model = second_way(tiny(), METHODS["snapkv"], generated=8, **HOST)
    ours = run(model, FIRST, new=30)
    assert ours.cache.evictions
    ids = following(FIRST, ours, QUESTIONS[0])
    check_same(run(reference, ids), run(model, ids, past_key_values=ours.cache))


def test_a_call_that_cannot_be_leaves_the_conversation_as_it_was(model: Any) -> None:
    ours = run(model, FIRST)
    ids = following(FIRST, ours, QUESTIONS[0])
    with pytest.raises(errors.LookaheadError, match="2 rows"):
        run(model, ids, past_key_values=ours.cache, lookahead_ids=[[1, 2], [3, 4]])
    with pytest.raises(errors.UnsupportedCallError, match="inputs_embeds with dropped='host'"):
        call(model, None, ours.cache, inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(errors.UnsupportedCallError, match="2 rows come behind"):
        call(model, prompt(4, batch=2), ours.cache)
    with pytest.raises(errors.UnsupportedCallError, match="count the conversation's tokens"):
        call(model, prompt(4), ours.cache, position_ids=torch.arange(4)[None])
    with pytest.raises(errors.UnsupportedCallError, match="a number of rows"):
        call(model, prompt(4), ours.cache, logits_to_keep=torch.tensor([1]))
    with pytest.raises(errors.DraftContextError):
        call(model, prompt(4096), ours.cache)
    check_same(run(model, ids), run(model, ids, past_key_values=ours.cache))


def test_other_models_go_on() -> None:
    """Another draft reads the conversation anew; another target would go on from what it has not read."""
    models = [second_way(tiny(seed=seed), METHODS["snapkv"]) for seed in (0, 3)]
    cache = host_cache(models[0], METHODS["snapkv"])
    ids = following(FIRST, run(models[0], FIRST, past_key_values=cache), QUESTIONS[0])
    with pytest.raises(errors.DroppedError, match="other weights"):
        run(models[1], ids, past_key_values=cache)
    check_same(run(models[0], ids), run(models[0], ids, past_key_values=cache))
    target, *drafts = (Identity.of(tiny(seed=seed, layers=1)) for seed in (0, 1, 2))
    talk = Conversation.of(FIRST)
    talk.check_reader(target, drafts[0])
    talk.draft.write(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    for draft, held in zip(drafts, (2 * 64 * 2 * 4 * 4, 0), strict=True):
        talk.check_reader(target, draft)
        assert talk.nbytes == held


def test_masks_of_what_comes_behind() -> None:
    ids = prompt(3)
    assert own_mask({}, ids).tolist() == [[1, 1, 1]]
    assert own_mask({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, ids).tolist() == [[0, 1, 1]]
    for wrong, text in ((torch.ones(1, 2), "pass a mask"), (torch.tensor([[1, 1, 0]]), "ends with 0")):
        with pytest.raises(errors.MaskError, match=text):
            own_mask({"attention_mask": wrong}, ids)


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("lfm2", METHODS["snapkv"], "layer 0 is configured as conv"),
        ("llama", specpass.SpecPC(budget=24, window=8), "SpecPC chooses the tokens"),
        ("llama", specpass.SnapKV(budget="auto", window=8), "share=0.95"),
    ],
)
def test_who_cannot_hold(family: str, method: Any, reason: str) -> None:
    target, draft = tiny(family, layers=1 + (family == "lfm2")), tiny(seed=1, layers=1) if method.needs_draft else None
    with pytest.raises(errors.DroppedError, match=reason):
        compile_eager(target, method, draft, **HOST)


def test_what_does_not_go_with_it() -> None:
    target, how = tiny(layers=1), METHODS["snapkv"]
    for make in (
        lambda: compile_eager(target, how, dropped="disk"),
        lambda: specpass.BudgetCache(target.config, how, dropped="disk"),
    ):
        with pytest.raises(errors.DroppedError, match="dropped='disk': expected 'host'"):
            make()
    model = compile_eager(target, how, **HOST)
    with pytest.raises(errors.DroppedError, match="assisted decoding"):
        run(model, FIRST, prompt_lookup_num_tokens=2)
    plain = tiny(layers=1)
    plain.compile(backend=specpass.Backend(method=how, lowering="eager"), dynamic=True)
    with pytest.raises(errors.DroppedError, match="through the plain door"):
        run(plain, FIRST, past_key_values=host_cache(plain, how))
    biased = compile_eager(tiny("bloom", layers=1), how, **HOST)
    with pytest.raises(errors.DroppedError, match="no scaled_dot_product_attention was seen"):
        run(biased, FIRST)
