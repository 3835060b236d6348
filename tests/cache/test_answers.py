"""Several sequences of one prompt: what a run of copies says, token for token, and bytes of one prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, compile_eager, padded, second_way
from tiny import prompt, tiny

import specpass
from specpass.backend import answers, direct
from specpass.cache.answers import prompts_of
from specpass.observe.storage import cache_bytes

C, W, K, D, LAYERS, ROOM = 24, 8, 2, 16, 2, 64
METHOD = specpass.SnapKV(budget=C, window=W)
ROWS = padded([prompt(length, seed=length) for length in (60, 9, 41)])


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(layers=LAYERS), METHOD)


def both(model: Any, **how: Any) -> tuple[Any, Any]:
    """Answers of prompts that are read once, and of prompts that are read for each, by the same dice."""
    found = []
    for once in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not once:
                patch.setattr(direct, "read_once", lambda *_: None)
            torch.manual_seed(3)
            options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, "do_sample": True}
            found.append(model.generate(**{**options, **how}))
    return found[0], found[1]


def check(shared: Any, copied: Any) -> None:
    assert torch.equal(shared.sequences, copied.sequences)
    for one, other in zip(shared.logits, copied.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "samples": {"num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "a long answer": {"num_return_sequences": 2, "max_new_tokens": 70},  # the storage grows
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_says_what_copies_say(model: Any, way: str) -> None:
    ids, mask = ROWS
    shared, copied = both(model, input_ids=ids, attention_mask=mask, **WAYS[way])
    check(shared, copied)
    cache, other = shared.past_key_values, copied.past_key_values
    assert other.answers == 1
    assert cache.answers == WAYS[way].get("num_beams", WAYS[way].get("num_return_sequences"))
    used = C + int(cache.layers[0].lengths.max())
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.positions, two.positions)
        assert torch.equal(one.prompt_slots, two.prompt_slots)
        torch.testing.assert_close(one.keys[:, :, :used], two.keys[:, :, :used], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values[:, :, :used], two.values[:, :, :used], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 5])
def test_bytes_are_one_prompt_and_each_answer(model: Any, count: int) -> None:
    shared, copied = both(model, input_ids=prompt(60), num_return_sequences=count)
    states, integers = 2 * LAYERS * K * D * 4, 8 * LAYERS * K
    due = states * (C + count * ROOM) + integers * (C + 1 + count)  # positions and counts; a length of each
    assert cache_bytes(shared.past_key_values) == due + 2 * 8  # the handle, and the tokens seen
    assert cache_bytes(copied.past_key_values) == count * (states * (C + ROOM) + integers * (C + 1)) + 2 * 8
    report = specpass.report(model)
    assert report.costs().answers_bytes(60, 8, count) == due
    assert report.data()["answers"] == {"each": count, "shared": LAYERS, "copied": {}, "prompt_bytes": states * C}
    assert f"answers: {count} of each prompt, which was read once" in str(report)


@torch.no_grad()
def test_particles_are_chosen_anew_at_every_step(model: Any) -> None:
    """Within their prompts, across them, more and fewer of them: as a batch of copies is; one graph while as many."""
    ids, mask = ROWS
    each, dice = 4, torch.Generator().manual_seed(0)
    many, copies = (specpass.BudgetCache(model.config, METHOD, 8) for _ in range(2))
    call(model, ids, many, attention_mask=mask)
    many.batch_repeat_interleave(each)
    call(model, ids.repeat_interleave(each, 0), copies, attention_mask=mask.repeat_interleave(each, 0))
    mask = mask.repeat_interleave(each, 0)
    graphs = len(specpass.report(model).graphs)
    own = torch.arange(3).repeat_interleave(each) * each
    chosen = [
        own + torch.randint(each, (12,), generator=dice),
        own + torch.randint(each, (12,), generator=dice),
        torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 7, 6, 5, 4]),  # other places, whole prompts
        torch.tensor([0, 0, 8, 9]),  # two prompts of three
        torch.tensor([3, 0, 1, 2]),  # unlike numbers: each holds its prompt
    ]
    for step, rows in enumerate(chosen):
        for cache in (many, copies):
            cache.batch_select_indices(rows) if len(rows) < len(mask) else cache.reorder_cache(rows)
        mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], 1)
        told = {"position_ids": mask.sum(1, keepdim=True) - 1, "attention_mask": mask}
        fed = torch.randint(1, 99, (len(rows), 1), generator=dice)
        ours, due = (call(model, fed, cache, **told) for cache in (many, copies))
        torch.testing.assert_close(ours, due, atol=1e-4, rtol=1e-4)
        if step == 1:
            assert len(specpass.report(model).graphs) <= graphs + 2
    assert [(len(layer.prompt_keys), layer.answers) for layer in many.layers] == [(4, 1)] * LAYERS


@torch.no_grad()
def test_turns_and_crops_behind_several_answers(model: Any) -> None:
    """Three tokens, of which one is masked in a row; then two are taken back."""
    ids, mask = ROWS
    many, copies = (specpass.BudgetCache(model.config, METHOD, 8) for _ in range(2))
    call(model, ids, many, attention_mask=mask)
    many.batch_repeat_interleave(2)
    call(model, ids.repeat_interleave(2, 0), copies, attention_mask=mask.repeat_interleave(2, 0))
    mask = mask.repeat_interleave(2, 0)
    for seed, hidden in ((1, 1), (2, 0)):
        own = torch.ones(6, 3, dtype=torch.int64)
        own[4, :hidden] = 0
        mask = torch.cat([mask, own], 1)
        told = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -3:], "logits_to_keep": 2}
        ours, due = (call(model, prompt(3, batch=6, seed=seed), cache, **told) for cache in (many, copies))
        torch.testing.assert_close(ours, due, atol=1e-4, rtol=1e-4)
    for cache in (many, copies):
        cache.crop(2)
    told = {"attention_mask": mask[:, :-1], "position_ids": mask[:, :-1].sum(1, keepdim=True) - 1}
    ours, due = (call(model, prompt(1, batch=6, seed=3), cache, **told) for cache in (many, copies))
    torch.testing.assert_close(ours, due, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_own_slots_stay_where_they_are(model: Any) -> None:
    """A step that was recorded finds them, and the prompt's are not touched."""
    cache = specpass.BudgetCache(model.config, METHOD, 8)
    call(model, prompt(60), cache)
    cache.batch_repeat_interleave(3)
    before = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors().values()]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors().values()] == before
    cache.batch_repeat_interleave(2)
    assert cache.answers == 6
    cache.reset()
    assert cache.answers == 1


def test_prompts_are_held_as_often_as_their_numbers_ask(model: Any) -> None:
    cache = specpass.BudgetCache(model.config, METHOD, 8)
    with torch.no_grad():
        call(model, prompt(60, batch=3), cache)
    cache.batch_repeat_interleave(2)  # rows 0 1, 2 3 and 4 5
    layer = cache.layers[0]
    for rows, due in (
        ([1, 0, 3, 3, 4, 5], None),
        ([0, 0, 0, 2, 2, 2, 4, 4, 4], None),
        ([4, 4, 0, 0], [2, 0]),
        ([0, 1, 0, 1, 2, 3], [0, 0, 1]),
        ([5], [2]),
    ):
        found = prompts_of(layer, torch.tensor(rows))
        assert (None if found is None else found.tolist()) == due


DRAFTED = specpass.SpecKV(budget=C, window=W, lookahead=5)
OTHERS: dict[str, tuple[str, int, Any, dict[str, Any], str]] = {  # family, layers, method, options, why they are copied
    "windows": ("gemma2", 2, METHOD, {}, ""),
    "speculation": ("llama", 1, DRAFTED, {"speculate": 3}, ""),
    "heads of all layers": ("llama", 2, specpass.SnapKV(budget=C, window=W, spread="global"), {}, ""),
    "bits": ("llama", 1, METHOD, {"cache_bits": 8}, "the prompt is quantised"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_beside_other_features(other: str) -> None:
    family, layers, method, options, why = OTHERS[other]
    target = tiny(family, layers=layers)
    subject = compile_eager(target, method, tiny(family, layers=layers) if method.drafts else None, **options)
    ids, mask = ROWS
    how = {"num_return_sequences": 2, "temperature": 0.3, "max_new_tokens": 12}
    check(*both(subject, input_ids=ids, attention_mask=mask, **how))
    told = specpass.report(subject).data()["answers"]
    assert told["copied"] == ({why: layers} if why else {})
    assert told["shared"] == (0 if why else layers)
    if "speculate" in options:
        assert specpass.report(subject).proposed > 0


def test_a_model_that_runs_by_its_own_forward() -> None:
    """With a convolution, whose states are each answer's."""
    subject = second_way(tiny("lfm2"), METHOD)
    check(*both(subject, input_ids=ROWS[0], attention_mask=ROWS[1], num_beams=2))
    assert specpass.report(subject).answers.shared == 1


def test_what_is_not_one_prompt_is_read_as_it_comes(model: Any) -> None:
    """Lookaheads of their own, or another model's inputs; the report says why."""
    ids = prompt(60)
    cache = specpass.BudgetCache(model.config, METHOD, 8)
    rows = torch.cat([ids, ids])
    for given, why in (
        ({"input_ids": torch.cat([ids, prompt(60, seed=1)])}, "their input_ids differ"),
        ({"input_ids": ids}, "1 rows come"),
        ({"input_ids": rows, "pixel_values": rows.float()}, "pixel_values comes with it"),
        ({"input_ids": rows, "return_dict": False}, "return_dict=False"),
    ):
        assert why in answers.one_of_each(cache, given, 2)
    own = specpass.BudgetCache(model.config, DRAFTED, 8, lookahead_ids=[[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    assert "a lookahead of its own" in answers.one_of_each(own, {"input_ids": rows}, 2)
