"""Speculative decoding with the draft that has looked ahead: the pruned target's own tokens, several at a time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import call, compile_eager, padded, run
from tiny import prompt, tiny

import specpass
from specpass.cache.drafting import DRAFTS
from specpass.errors import SpeculationError
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear8 import rows8

C, W, L = 40, 4, 4
SIZES = {"prompt_budget": 44, "prompt_window": W, "prompt_kernel": 3, "neighbours": 3, "first_layer": 0}
METHODS = {
    "speckv": specpass.SpecKV(budget=C, window=W, lookahead=L),
    "unverified": specpass.SpecKV(budget=C, window=W, lookahead=L, verify=False),
    "speckvpc": specpass.SpecKVPC(budget=C, window=W, lookahead=L, **SIZES),
    "specpc": specpass.SpecPC(budget=44, window=W, kernel=3, neighbours=3, first_layer=0),
}


@functools.cache
def both(method: str, seed: int = 0) -> tuple[Any, Any]:
    """The same pair without and with speculation; seed 0 drafts as the target does with all KV."""
    how, layers = METHODS[method], 2 if (method, seed) == ("speckv", 0) else 1  # one is enough for the others

    def model(seed: int = 0) -> Any:
        return tiny(seed=seed, layers=layers)

    return (compile_eager(model(), how, model(seed)), compile_eager(model(), how, model(seed), speculate=3))


@pytest.mark.parametrize(
    ("method", "seed"), [("speckv", 0), ("speckv", 1), ("unverified", 0), ("speckvpc", 0), ("specpc", 1)]
)
def test_greedy_answers_are_the_pruned_targets(method: str, seed: int) -> None:
    """Prompts that are pruned and that fit; a padded batch; an answer that outgrows the room."""
    plain, fast = both(method, seed)
    for ids, new in ((prompt(60, seed=60), 12), (prompt(9, seed=9), 12), (prompt(52, seed=3), 70)):
        due, ours = run(plain, ids, new), run(fast, ids, new)
        assert ours.tokens == due.tokens
        torch.testing.assert_close(ours.logits, due.logits, atol=1e-4, rtol=1e-4)
    if (method, seed) == ("speckv", 0):
        ids, mask = padded([prompt(50, seed=1), prompt(31, seed=2), prompt(20, seed=3)])
        assert run(fast, ids, 12, mask).tokens == run(plain, ids, 12, mask).tokens
    found = specpass.report(fast)
    assert found.proposed > 0
    assert "proposed tokens were taken" in str(found)
    if seed == 0:
        assert found.accepted > 0


def test_bfloat16_by_the_cpus_own_kernels() -> None:
    """Heads that a CPU's kernels for one new token serve: blocks of several, proposals and turns, go another way."""
    target, twin = (tiny(head_dim=32).to(torch.bfloat16) for _ in range(2))
    method = specpass.SpecKV(budget=60, window=W, lookahead=L)
    model = specpass.compile(target, draft=twin, method=method, speculate=3, lowering="inductor")
    ids, turn = prompt(50, seed=4), prompt(5, seed=5)
    first = run(model, ids, 22)
    assert specpass.report(model).accepted >= 10  # the draft is the target: a near tie is all that parts them
    read = torch.cat([ids, torch.tensor(first.tokens), turn], 1)
    found = run(model, read, 1, past_key_values=first.cache).logits[:, 0]
    due = twin.float()(read).logits[:, -1]
    assert float((found.float() - due).abs().max()) < 0.1 * float(due.std())


def test_a_draft_in_eight_bits_changes_no_answer() -> None:
    """Its proposals may be others: they are the target's to take."""
    plain, fast = (
        compile_eager(
            tiny(layers=1).to(torch.bfloat16), METHODS["unverified"], tiny(layers=1).to(torch.bfloat16), **options
        )
        for options in ({}, {"speculate": 3, "draft_bits": 8})
    )
    ids = prompt(60, seed=60)
    assert run(fast, ids, 12).tokens == run(plain, ids, 12).tokens
    found = specpass.report(fast)
    assert found.accepted > 0
    without = isinstance(rows8(), Unbuilt)  # this CPU has no instructions for it
    assert ("weights are read as they are: " if without else "copies of its weights in 8 bits") in str(found)


def test_a_draft_that_is_right_saves_calls_of_the_target() -> None:
    """Where nothing is dropped, the target's twin is always right: one call for four tokens."""
    target, draft, twin = (tiny(layers=1) for _ in range(3))
    model = compile_eager(target, specpass.SpecKV(budget=60, window=W, lookahead=L), draft, speculate=3)
    ours = run(model, prompt(50, seed=4), 22)
    assert ours.tokens == run(twin, prompt(50, seed=4), 22).tokens
    found = specpass.report(model)
    assert found.replayed == L
    assert found.accepted == 3 * 4
    assert found.proposed == 3 * 5


def test_samples_are_drawn_from_the_pruned_targets_distribution() -> None:
    """The same draws give the same tokens; and over many rows the third token's shares are its probabilities."""
    plain, fast = both("unverified")
    ids = prompt(52, seed=8)
    how: dict[str, Any] = {"do_sample": True, "temperature": 0.3, "max_new_tokens": 6}
    for seed in range(3):
        answers = []
        for model in (plain, fast):
            torch.manual_seed(seed)
            answers.append(model.generate(ids, **how))
        assert torch.equal(*answers)
    torch.manual_seed(0)
    rows = fast.generate(ids, **{**how, "max_new_tokens": 3}, num_return_sequences=600)[:, 52:]
    first = rows[:, :2].unique(dim=0, return_counts=True)
    begun = first[0][first[1].argmax()]
    third = rows[(rows[:, :2] == begun).all(1), 2]
    cache = specpass.BudgetCache(plain.config, METHODS["unverified"], max_new_tokens=3)
    call(plain, ids, cache)
    logits = [call(plain, token.view(1, 1), cache) for token in begun][-1][0, -1]
    expected = (logits / 0.3).softmax(-1) * len(third)
    common = expected >= 5
    found = torch.bincount(third, minlength=len(expected)).float()
    pairs = [(found[common], expected[common]), (found[~common].sum()[None], expected[~common].sum()[None])]
    chi = sum(float(((seen - due) ** 2 / due.clamp(min=1e-9)).sum()) for seen, due in pairs if float(due.sum()) > 1)
    freedom = int(common.sum())
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_a_crop_a_turn_and_beams() -> None:
    plain, fast = both("speckv")
    ids, answers = prompt(60, seed=60), []
    for model in (plain, fast):
        cache = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=40)
        first = run(model, ids, 10, past_key_values=cache)
        cache.crop(2)
        turn = torch.cat([ids, torch.tensor(first.tokens)[:, :-3], prompt(5, seed=2)], 1)
        second = run(model, turn, 10, past_key_values=cache)
        answers.append((first.tokens, second.tokens, cache.get_seq_length(), cache.layers[0].lengths.tolist()))
    assert answers[0] == answers[1]
    beams = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    ours, due = fast.generate(ids, **beams), plain.generate(ids, **beams)
    assert torch.equal(ours.sequences, due.sequences)
    assert ours.past_key_values not in DRAFTS


def test_an_assistant_answers_as_generate_does() -> None:
    plain, fast = both("speckv")
    ids = prompt(60, seed=60)
    due = plain.generate(ids, max_new_tokens=16, do_sample=False)
    for model in (plain, fast):
        for helper in (tiny(), tiny(seed=1, layers=1)):
            assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=helper), due)


WRONG = [
    *((count, METHODS["speckv"], True) for count in (-1, 2.5, True)),
    (4, specpass.SnapKV(budget=C, window=W), True),
    (4, specpass.SpecKV(budget=C, lookahead_ids=[[1]]), False),
]


@pytest.mark.parametrize(("count", "how", "draft"), WRONG)
def test_what_cannot_speculate_is_an_error_before_anything_is_changed(count: Any, how: Any, draft: bool) -> None:
    model = tiny()
    with pytest.raises(SpeculationError, match=f"speculate={count}"):
        specpass.compile(model, draft=tiny() if draft else None, method=how, speculate=count)
    assert "_specpass" not in model.__dict__


def test_a_target_without_graphs_says_so() -> None:
    from specpass.benchmarks.coverage.tiny import tiny_model

    model = compile_eager(tiny_model("lfm2"), METHODS["speckv"], tiny_model("llama", 1), speculate=3)
    run(model, prompt(60, seed=60), 6)
    assert "speculation needs graphs" in str(specpass.report(model))
    assert "no verified lookahead" in str(specpass.report(model))
