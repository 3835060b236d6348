"""Verified lookahead: while the answer is the lookahead, its logits are full KV's, and no step runs."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support import call, check_answer, compile_eager, kept, padded, run
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass.cache.replay import REPLAYS
from specpass.testing import eager

C, W, L = 16, 4, 8
IDS = prompt(60, seed=5)


def method(**options: Any) -> specpass.SpecKV:
    return specpass.SpecKV(budget=C, window=W, lookahead=L, **options)


def pair(layers: int = 1, **options: Any) -> Any:
    """A target whose draft is its twin: the lookahead is full KV's own answer."""
    return compile_eager(tiny(layers=layers), method(**options), tiny(layers=layers))


def full(ids: Tensor, new: int, layers: int = 1) -> eager.Generation:
    return eager.generate_full(tiny(layers=layers), ids, new, eos_ids=())


def came_free(model: Any) -> int:
    return specpass.report(model).replayed


def test_the_answer_is_full_kvs_for_as_long_as_the_lookahead() -> None:
    model, due = pair(layers=2), full(IDS, L + 1, layers=2)
    ours = run(model, IDS, L + 4)
    assert ours.tokens[0][: L + 1] == due.tokens
    torch.testing.assert_close(ours.logits[0, : L + 1], due.logits, atol=1e-4, rtol=1e-4)
    assert came_free(model) == L
    check_answer(ours, tiny(), IDS, kept(ours.cache))  # and goes on from the lookahead's own keys and values
    assert "8 tokens of answers came free" in str(specpass.report(model))


def test_without_it_every_token_is_decoded() -> None:
    model = pair(verify=False)
    ours = run(model, IDS, L)
    check_answer(ours, tiny(layers=1), IDS, kept(ours.cache))
    assert came_free(model) == 0
    assert ours.cache not in REPLAYS


def test_a_lookahead_of_the_prompts_own() -> None:
    how = specpass.SpecKV(budget=C, window=W, lookahead="ngram")
    model, cache = (
        compile_eager(tiny(layers=1), how),
        specpass.BudgetCache(tiny(layers=1).config, how, max_new_tokens=L),
    )
    first = call(model, IDS, cache)
    ahead = cache.lookahead_ids
    due = tiny(layers=1)(input_ids=torch.cat([IDS, ahead], 1)).logits
    assert ahead.shape == (1, L)
    torch.testing.assert_close(first[:, -1], due[:, 59], atol=1e-4, rtol=1e-4)
    for step in range(3):
        logits = call(model, ahead[:, [step]], cache)
        torch.testing.assert_close(logits[:, -1], due[:, 60 + step], atol=1e-4, rtol=1e-4)
    assert came_free(model) == 3


def test_the_plain_door() -> None:
    model = tiny(layers=1)
    model.compile(backend=specpass.Backend(tiny(layers=1), method(), lowering="eager"), dynamic=True)
    ours = run(model, IDS, L + 3, past_key_values=specpass.BudgetCache(model.config, method(), max_new_tokens=L + 3))
    check_answer(ours, tiny(layers=1), IDS, kept(ours.cache))
    assert came_free(model) == L


@pytest.mark.parametrize("follows", [0, 1, 5])
def test_a_lookahead_that_is_left(follows: int) -> None:
    """Steps after that know nothing of it; a draft that is wrong from its first token leaves nothing behind."""
    ahead = full(IDS, L).tokens
    ahead[follows:] = [token % 100 + 1 for token in ahead[follows:]]
    model = compile_eager(tiny(layers=1), specpass.SpecKV(budget=C, window=W, lookahead_ids=[ahead]))
    ours = run(model, IDS, L + 2)
    check_answer(ours, tiny(layers=1), IDS, kept(ours.cache))
    assert came_free(model) == follows
    assert ours.cache not in REPLAYS
    assert int(ours.cache.layers[0].lengths[0, 0]) == C + L + 1


def test_rows_of_a_batch_leave_one_by_one() -> None:
    """Each row, padded or not, is the row alone, whatever its neighbours do; a short one keeps everything."""
    rows = [IDS, prompt(31, seed=6), prompt(9, seed=7)]
    aheads = []
    for row, (own, right) in enumerate(zip(rows, (L, 3, 0), strict=True)):
        ahead = full(own, L).tokens
        aheads.append(ahead[:right] + [token % 100 + 1 + row for token in ahead[right:]])
    how = specpass.SpecKV(budget=C, window=W, lookahead_ids=aheads)
    model, (ids, mask) = compile_eager(tiny(layers=1), how), padded(rows)
    ours = run(model, ids, L + 3, mask)
    assert came_free(model) == L + 3
    for row, own in enumerate(rows):
        check_answer(ours, tiny(layers=1), own, kept(ours.cache, row), row)


def test_sampling_draws_from_full_kvs_logits() -> None:
    """The same numbers draw the same tokens, and a token that the draft did not write ends it."""
    model, twin = pair(), tiny(layers=1)
    options = {"do_sample": True, "temperature": 0.5, "return_dict_in_generate": True, "output_logits": True}
    for seed in range(3):
        torch.manual_seed(seed)
        ours = model.generate(IDS, max_new_tokens=L, **options)
        torch.manual_seed(seed)
        theirs = twin.generate(IDS, max_new_tokens=L, **options)
        ahead, tokens = ours.past_key_values.lookahead_ids[0].tolist(), ours.sequences[0, 60:].tolist()
        followed = next((i for i, token in enumerate(tokens) if i == L or token != ahead[i]), len(tokens))
        for step in range(min(followed + 1, len(tokens))):
            torch.testing.assert_close(ours.logits[step], theirs.logits[step], atol=1e-4, rtol=1e-4)


def test_beams_are_reordered_with_what_is_known_of_them() -> None:
    """Where nothing is dropped, beams that follow and leave the lookahead are the model's own."""
    how = specpass.SpecKV(budget=60, window=W, lookahead=L)
    model, twin = compile_eager(tiny(layers=1), how, tiny(layers=1)), tiny(layers=1)
    options = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2, "do_sample": False}
    cache = specpass.BudgetCache(model.config, how, max_new_tokens=6, early_exit=False)
    ours, theirs = model.generate(IDS, past_key_values=cache, **options), twin.generate(IDS, **options)
    assert torch.equal(ours, theirs)
    assert came_free(model) > 0


def test_a_turn_a_crop_a_copy_and_a_reset_in_the_middle() -> None:
    model, due = pair(), full(IDS, 4).tokens
    cache = specpass.BudgetCache(model.config, method(), max_new_tokens=20)
    call(model, IDS, cache)
    call(model, torch.tensor([due[:1]]), cache)
    assert cache in REPLAYS
    twin = copy.deepcopy(cache)
    following = [call(model, torch.tensor([due[1:2]]), own) for own in (cache, twin)]
    torch.testing.assert_close(*following, atol=0, rtol=0)
    assert torch.equal(cache.layers[0].lengths, twin.layers[0].lengths)
    cache.crop(1)
    torch.testing.assert_close(call(model, torch.tensor([due[1:2]]), cache), following[0], atol=0, rtol=0)
    free = came_free(model)
    turn = call(model, torch.tensor([[due[2], 3, 4]]), twin, logits_to_keep=0)  # follows, and then goes its own way
    assert came_free(model) == free + 1
    torch.testing.assert_close(turn[:, 0], full(IDS, 4).logits[3:], atol=1e-4, rtol=1e-4)
    call(model, torch.tensor([[5]]), twin)
    assert twin not in REPLAYS
    twin.reset()
    call(model, IDS, twin)
    assert twin in REPLAYS
    assert torch.equal(twin.lookahead_ids[0, :4], torch.tensor(due))


@pytest.mark.parametrize("right", [0, 3, L])
def test_an_assistants_candidates_follow_it_too(right: int) -> None:
    """generate(assistant_model=draft) answers as generate() does, whatever of the lookahead is right."""
    ahead = full(IDS, L).tokens
    ahead[right:] = [token % 100 + 1 for token in ahead[right:]]
    how = specpass.SpecKV(budget=C, window=W, lookahead_ids=[ahead])
    model = compile_eager(tiny(layers=1), how)
    alone = model.generate(IDS, max_new_tokens=L + 6, do_sample=False)
    free = came_free(model)
    for helper in (tiny(layers=1), tiny(seed=1, layers=1)):
        assert torch.equal(model.generate(IDS, max_new_tokens=L + 6, do_sample=False, assistant_model=helper), alone)
    assert came_free(model) >= 2 * free


def test_it_is_freed_with_the_answer() -> None:
    """Used up, left behind, or its cache gone: the logits [B, L, V] go."""
    model = pair()
    for new in (L + 1, 2):
        gc.collect()
        before = len(REPLAYS)
        ours = run(model, IDS, new)
        assert (ours.cache in REPLAYS) == (new == 2)
        del ours
        gc.collect()
        assert len(REPLAYS) == before


def test_behind_an_end_nothing_is_asked_for() -> None:
    draft, due = tiny(layers=1), full(IDS, L).tokens
    draft.generation_config.eos_token_id = due[3]
    model = compile_eager(tiny(layers=1), method(), draft)
    end = due.index(due[3])
    ours = run(model, IDS, L, eos_token_id=due[3])
    assert ours.tokens[0] == due[: end + 1]
    assert came_free(model) == end
    assert ours.cache not in REPLAYS


def test_windows_keep_the_lookahead_behind_them() -> None:
    """Sliding layers hold the last V prompt tokens, and the lookahead once it is followed."""
    from specpass.benchmarks.coverage.tiny import tiny_model

    how = specpass.SpecKV(budget=59, window=W, lookahead=L)
    model = compile_eager(tiny_model("gemma3_text"), how, tiny_model("gemma3_text"))
    twin = tiny_model("gemma3_text")
    ours, theirs = (run(one, IDS, L + 1) for one in (model, twin))
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert came_free(model) == L


def test_a_compressed_prompt_is_what_is_verified() -> None:
    """SpecKV-PC: full KV of the prompt tokens that the target read."""
    sizes = {"prompt_budget": 40, "prompt_window": W, "prompt_kernel": 3, "neighbours": 3, "first_layer": 0}
    how = specpass.SpecKVPC(budget=C, window=W, lookahead=L, **sizes)
    model = compile_eager(tiny(layers=1), how, tiny(layers=1))
    ours = run(model, IDS, L)
    read = ours.cache.prompt_positions[0]
    due = full(IDS[:, read], L)
    ahead = ours.cache.lookahead_ids[0].tolist()
    followed = next((i for i, token in enumerate(ours.tokens[0]) if token != ahead[i]), L)
    assert ours.tokens[0][: followed + 1] == due.tokens[: followed + 1]
    torch.testing.assert_close(ours.logits[0, : followed + 1], due.logits[: followed + 1], atol=1e-4, rtol=1e-4)
    assert came_free(model) == min(followed, L - 1)


def test_more_results_than_logits_are_decoded() -> None:
    model = pair()
    ours = run(model, IDS, 3, output_hidden_states=True)
    check = run(compile_eager(tiny(layers=1), method(verify=False), tiny(layers=1)), IDS, 3)
    assert ours.tokens == check.tokens
    assert came_free(model) == 0
    assert "no verified lookahead: the call returns more than logits" in str(specpass.report(model))
