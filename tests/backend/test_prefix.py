"""A question behind a document that was read once is pruned and answered as if both had come as one prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import Recorder
from support import call, check_same, compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import specpass
from specpass import errors
from specpass.interpret.branches import Branches
from specpass.interpret.rows import Packing
from specpass.methods import base
from specpass.observe.progress import watching
from specpass.sizes import Span

W = 8
DOCUMENT = prompt(60)
QUESTIONS = [prompt(11, seed=1), prompt(3, seed=2), prompt(14, seed=3)]
METHODS = {
    "speckv": specpass.SpecKV(budget=24, window=W, lookahead=5),
    "sampled": specpass.SpecKV(budget=24, window=W, lookahead=4, temperature=0.8, seed=3),
    "ngram": specpass.SpecKV(budget=24, window=W, lookahead="ngram"),
    "snapkv": specpass.SnapKV(budget=24, window=W),
    "streamingllm": specpass.StreamingLLM(budget=24),
    "pyramidkv": specpass.PyramidKV(budget=24, window=W),
}
FAMILIES = ["mistral-sliding", "llama4", "gpt2", "opt", "qwen3"]


def without_graphs(family: str, method: Any) -> Any:
    return second_way(tiny(family), method, tiny(family, seed=1000) if method.needs_draft else None)


def pair_of(family: str, method: Any) -> Any:
    return compile_eager(tiny(family), method, tiny(family, seed=1000) if method.needs_draft else None)


@pytest.fixture(scope="module")
def model() -> Any:
    """Its own draft, so that answers follow the lookahead."""
    return compile_eager(tiny(), METHODS["speckv"], tiny())


@pytest.fixture(scope="module")
def prefix(model: Any) -> specpass.Prefix:
    return specpass.read(model, DOCUMENT)


def behind(question: Tensor) -> Tensor:
    return torch.cat([DOCUMENT, question], 1)


def ask(model: Any, batch: bool) -> None:
    """Each question by itself and all as one batch, against prompts that are read whole."""
    wholes = [run(model, behind(question)) for question in QUESTIONS]
    free = specpass.report(model).replayed
    prefix = specpass.read(model, DOCUMENT)
    before = [states.clone() for pair in prefix.pairs for states in pair]
    for whole, question in zip(wholes, QUESTIONS, strict=True):  # the second is shorter than the window
        check_same(whole, run(model, question, prefix=prefix))
    assert specpass.report(model).replayed == 2 * free
    if batch:
        ids, mask = padded(QUESTIONS)
        ours = run(model, ids, mask=mask, prefix=prefix)
        for row, whole in enumerate(wholes):
            check_same(whole, ours, row)
    after = [states for pair in prefix.pairs for states in pair]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_questions_and_batches_of_them(model: Any) -> None:
    ask(model, batch=True)
    assert specpass.report(model).replayed


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"speckv"}))
def test_methods(name: str) -> None:
    model = without_graphs("llama", METHODS[name])
    ask(model, batch=name != "sampled")  # rows of a batch draw other numbers
    assert not specpass.report(model).graphs


def test_layers_with_budgets_of_their_own() -> None:
    """A window and a pyramid, with steps by graphs."""
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "use_sliding_window": True}
    target = tiny("qwen2", layers=3, sliding_window=20, **kinds)
    whole = run(second_way(target, METHODS["pyramidkv"]), behind(QUESTIONS[0]))
    model = compile_eager(target, METHODS["pyramidkv"])
    check_same(whole, run(model, QUESTIONS[0], prefix=specpass.read(model, DOCUMENT)))


GRAPHS = {  # what graphs alone prune so: their choices are compared, and their steps go on
    "heads": specpass.SnapKV(budget=24, window=W, spread="heads"),
    "global": specpass.SpecKV(budget=24, window=W, lookahead=2, futures=2, reconstruction=True, spread="global"),
    "share": specpass.SnapKV(budget=48, window=W, share=0.5),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_graphs_spread_branch_and_choose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and layers that share budgets, several futures, and a budget for each prompt."""
    monkeypatch.setattr(base, "LADDER", (16, 32, 48))
    method, target = GRAPHS[name], tiny(layers=1 + (name == "global"))
    model = compile_eager(target, method, tiny(seed=1000, layers=1) if method.needs_draft else None)
    wholes = [run(model, behind(question)) for question in QUESTIONS]
    prefix = specpass.read(model, DOCUMENT)
    for whole, question in zip(wholes, QUESTIONS, strict=True):
        ours = run(model, question, prefix=prefix)
        check_same(whole, ours)
        if name == "share":
            assert ours.cache.kept.budget == whole.cache.kept.budget
            assert ours.cache.kept.layers == pytest.approx(whole.cache.kept.layers)
        for layer, other in zip(ours.cache.layers, whole.cache.layers, strict=True):
            assert layer.key_buffer.shape == other.key_buffer.shape
            assert torch.equal(layer.prompt_slots, other.prompt_slots)
    ids, mask = padded(QUESTIONS)
    ours = run(model, ids, mask=mask, prefix=prefix)
    if name == "share":  # a batch gets what its neediest row needs
        assert ours.cache.kept.budget == max(whole.cache.kept.budget for whole in wholes) == 32
        return
    for row, whole in enumerate(wholes):
        check_same(whole, ours, row)
    if name == "heads":  # so do turns
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=6, dropped="host")
        run(model, DOCUMENT, past_key_values=cache, new=1)
        check_same(wholes[0], run(model, behind(QUESTIONS[0]), past_key_values=cache))


def test_futures_see_what_their_positions_see() -> None:
    """Windows are of positions, and a second future's columns lie further back than these."""
    branches = Branches(Packing(torch.tensor([10])), 3, 2, 2)
    seen = branches.seen(14, Span(sliding=4))[0]
    assert branches.positions(torch.tensor([[7]])).tolist() == [[7, 8, 9, 10, 11, 10, 11]]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [4, 5, 6, 7],
        [5, 6, 7, 8],
        [6, 7, 8, 9],
        [7, 8, 9, 10],
        [8, 9, 10, 11],
        [7, 8, 9, 12],
        [8, 9, 12, 13],
    ]


def test_what_needs_steps_by_graphs() -> None:
    for name, text in (("heads", "spread='heads' needs steps"), ("share", "share=0.5 needs steps")):
        model = without_graphs("llama", GRAPHS[name])
        prefix = specpass.read(model, DOCUMENT)
        with pytest.raises(errors.PrefixUnsupportedError, match=text):
            run(model, QUESTIONS[0], prefix=prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = without_graphs(family, METHODS["snapkv"])
    prefix = specpass.read(model, DOCUMENT)
    ids, mask = padded(QUESTIONS[:2])
    ours = run(model, ids, mask=mask, prefix=prefix)
    for row, question in enumerate(QUESTIONS[:2]):
        check_same(run(model, behind(question)), ours, row)


def test_a_prompt_that_fits_the_budget_is_exact() -> None:
    model = without_graphs("llama", specpass.SnapKV(budget=80, window=W))
    prefix = specpass.read(model, DOCUMENT[0].tolist())
    check_same(run(model, behind(QUESTIONS[0])), run(model, QUESTIONS[0], prefix=prefix))


def test_a_document_that_is_hardly_there() -> None:
    model = without_graphs("llama", METHODS["snapkv"])
    prefix = specpass.read(model, DOCUMENT[:, :2])
    question = prompt(40, seed=9)
    whole = run(model, torch.cat([DOCUMENT[:, :2], prompt(40, seed=9)], 1))
    check_same(whole, run(model, question, prefix=prefix))
    ids, mask = padded([question, prompt(3, seed=8)])
    check_same(whole, run(model, ids, mask=mask, prefix=prefix))


def test_several_prefixes_and_a_second_turn() -> None:
    model, reference = pair_of("llama", METHODS["snapkv"]), without_graphs("llama", METHODS["snapkv"])
    prefix, other = specpass.read(model, DOCUMENT), specpass.read(model, prompt(50, seed=5))
    assert other.key != prefix.key
    run(model, QUESTIONS[0], prefix=other)
    first, whole = run(model, QUESTIONS[0], prefix=prefix), run(reference, behind(QUESTIONS[0]))
    check_same(whole, first)
    turn = torch.cat([QUESTIONS[0], torch.tensor(first.tokens), prompt(7, seed=6)], 1)
    ours = run(model, turn, past_key_values=first.cache, prefix=prefix)
    assert ours.tokens == run(reference, behind(turn), past_key_values=whole.cache).tokens
    with pytest.raises(errors.PrefixCacheError, match="another prefix"):
        run(model, turn, past_key_values=first.cache, prefix=other)


def test_beams_and_direct_calls() -> None:
    model, question = without_graphs("llama", METHODS["snapkv"]), QUESTIONS[0]
    prefix = specpass.read(model, DOCUMENT)
    beams = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    ones = {"attention_mask": torch.ones_like(question)}
    found = model.generate(question, prefix=prefix, **beams, **ones)[:, question.shape[1] :]
    whole = model.generate(behind(question), **beams, attention_mask=torch.ones_like(behind(question)))
    assert torch.equal(found, whole[:, -found.shape[1] :])
    caches = [specpass.BudgetCache(model.config, METHODS["snapkv"]) for _ in range(2)]
    logits = call(model, question, caches[0], prefix=prefix, logits_to_keep=0)
    expected = call(model, behind(question), caches[1], logits_to_keep=0)
    torch.testing.assert_close(logits, expected[:, 60:], atol=1e-4, rtol=1e-4)
    assert int(caches[0].get_seq_length()) == 11
    cache = specpass.BudgetCache(model.config, METHODS["snapkv"])
    with torch.no_grad():
        out = model(question, past_key_values=cache, prefix=prefix, logits_to_keep=1, output_hidden_states=True)
    assert [states.shape[1] for states in (out.logits, *out.hidden_states)] == [1, 11, 11, 11]
    token = torch.tensor([[5]])
    torch.testing.assert_close(call(model, token, caches[0]), call(model, token, caches[1]), atol=1e-4, rtol=1e-4)


def test_lookahead_ids_need_no_draft() -> None:
    method = specpass.SpecKV(budget=24, window=W, lookahead_ids=((7, 8, 9),))
    model = second_way(tiny(), method)
    prefix = specpass.read(model, DOCUMENT)
    assert prefix.draft is None
    check_same(run(model, behind(QUESTIONS[0])), run(model, QUESTIONS[0], prefix=prefix))
    short, question = specpass.read(model, DOCUMENT[:, :2]), prompt(40, seed=9)
    whole = run(model, torch.cat([DOCUMENT[:, :2], question], 1), lookahead_ids=[[4, 5]])
    check_same(whole, run(model, question, prefix=short, lookahead_ids=[[4, 5]]))


def test_the_draft_goes_on_as_a_speculator() -> None:
    """Everything is kept, so that a draft of the same weights is right: behind a prefix, and behind a turn."""
    method = specpass.SpecKV(budget=100, window=W, lookahead=3)
    model = compile_eager(tiny(), method, tiny(), speculate=3)
    prefix, plain = specpass.read(model, DOCUMENT), tiny()
    exact = run(plain, behind(QUESTIONS[0]), new=12)
    assert run(model, QUESTIONS[0], new=12, prefix=prefix).tokens == exact.tokens
    report, ids = specpass.report(model), behind(QUESTIONS[0])
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=12, early_exit=False, dropped="host")
    for _ in range(2):
        accepted, theirs = report.accepted, run(plain, ids, new=12)
        assert run(model, ids, new=12, past_key_values=cache).tokens == theirs.tokens
        assert report.accepted > accepted > 0
        ids = torch.cat([ids, torch.tensor(theirs.tokens), QUESTIONS[1]], 1)


def test_bytes_and_progress(model: Any, prefix: specpass.Prefix) -> None:
    assert len(prefix) == 60
    assert prefix.nbytes == 2 * 2 * 2 * 2 * 60 * 16 * 4  # models, layers, K and V, heads, tokens, D, float32
    with watching(recorder := Recorder()):
        specpass.read(model, DOCUMENT, device="cpu")
        run(model, QUESTIONS[0], prefix=prefix)
    told = str(vars(recorder))
    for what in (
        "the draft reads the document",
        "reading the document",
        "the draft looks ahead",
        "reading the question",
    ):
        assert what in told
    assert "questions behind a prefix" in str(specpass.report(model))


def test_what_another_has_read(model: Any, prefix: specpass.Prefix) -> None:
    method = METHODS["speckv"]
    cases = [
        (errors.PrefixModelError, compile_eager(tiny(layers=3), method, tiny(seed=1000)), "config is another"),
        (errors.PrefixModelError, compile_eager(tiny(seed=7), method, tiny(seed=1000)), "other weights"),
        (errors.PrefixDtypeError, compile_eager(tiny().to(torch.float64), method, tiny(seed=1000)), "float64"),
        (errors.PrefixDraftError, compile_eager(tiny(), method, tiny(seed=8)), "other weights or dtype"),
    ]
    for error, other, text in cases:
        with pytest.raises(error, match=text):
            run(other, QUESTIONS[0], prefix=prefix)
    alone = specpass.read(compile_eager(tiny(), specpass.SnapKV(budget=24, window=W)), DOCUMENT)
    with pytest.raises(errors.PrefixDraftError, match="no draft has read"):
        run(model, QUESTIONS[0], prefix=alone)
    check_same(
        run(model, behind(QUESTIONS[1])), run(model, QUESTIONS[1], prefix=prefix)
    )  # an error leaves everything as it was


def test_calls_that_cannot_be(model: Any, prefix: specpass.Prefix) -> None:
    question = QUESTIONS[0]
    for ids in ([], torch.empty(1, 0, dtype=torch.int64), prompt(4, batch=2)):
        with pytest.raises(errors.PromptError, match="document_ids hold"):
            specpass.read(model, ids)
    full = run(model, behind(question)).cache
    with pytest.raises(errors.PrefixCacheError, match="without a prefix"):
        run(model, question, past_key_values=full, prefix=prefix)
    with pytest.raises(errors.PrefixCacheError, match="DynamicCache"):
        run(model, question, past_key_values=DynamicCache(), prefix=prefix)
    with pytest.raises(errors.PrefixCacheError, match="use_cache=False"):
        run(model, question, use_cache=False, prefix=prefix)
    with pytest.raises(errors.UnsupportedCallError, match=r"specpass\.read"):
        run(model, question, prefix=question)
    with pytest.raises(errors.UnsupportedCallError, match="of the question alone"):
        call(
            model,
            question,
            specpass.BudgetCache(model.config, METHODS["speckv"]),
            prefix=prefix,
            attention_mask=torch.ones(1, 71),
        )
    with pytest.raises(errors.PrefixUnsupportedError, match="assistant_model"):
        run(model, question, prompt_lookup_num_tokens=2, prefix=prefix)
    with pytest.raises(errors.UnsupportedCallError, match=r"specpass\.compile"):
        specpass.read(tiny(), DOCUMENT)


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("lfm2", METHODS["snapkv"], "layer 0 is configured as conv"),
        ("llama", specpass.SpecPC(budget=24, window=W), "SpecPC chooses the tokens"),
        ("llama", specpass.SpecKV(budget=24, window=W, sparse_prefill=16), "sparse_prefill=16"),
    ],
)
def test_who_cannot_go_on_from_a_prefix(family: str, method: Any, reason: str) -> None:
    with pytest.raises(errors.PrefixUnsupportedError, match=reason):
        specpass.read(pair_of(family, method), DOCUMENT)


def test_layers_that_only_a_graph_prunes() -> None:
    model = pair_of("bloom", METHODS["snapkv"])
    prefix = specpass.read(model, DOCUMENT)
    with pytest.raises(errors.PrefixUnsupportedError, match="no scaled_dot_product_attention was seen"):
        run(model, QUESTIONS[0], prefix=prefix)
