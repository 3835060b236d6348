"""A draft with another tokenizer reads the prompt's text, and the target gets its tokens and scores as its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Run, call, check_answer, check_rules, compile_eager, kept, padded, run
from tiny import prompt, tiny
from tokenizers_of import LETTERS, letters, pairs_of_letters

import specpass
from specpass import errors
from specpass.backend import direct
from specpass.sizes import eos_ids
from specpass.testing.prompt import PromptScoring, choose, pooled, prompt_scores

C, W, L = 24, 8, 5
PROMPTS = [prompt(60), prompt(44, seed=1), prompt(18, seed=2)]
OURS = letters()
THEIRS = pairs_of_letters("".join(LETTERS[index] for ids in PROMPTS for index in ids[0]))
SPECPC = {"window": W, "lookahead": 3, "kernel": 5, "neighbours": 3}
METHODS = {
    "speckv": specpass.SpecKV(budget=C, window=W, lookahead=L),
    "specpc": specpass.SpecPC(budget=30, **SPECPC),
    "speckvpc": specpass.SpecKVPC(
        budget=20, window=W, lookahead=L, prompt_budget=40, prompt_window=W, prompt_kernel=5, neighbours=3
    ),
}


def by_text(method: Any, draft: Any, tokenizers: Any = (OURS, THEIRS)) -> Any:
    return compile_eager(tiny(layers=1), method, draft, tokenizers=tokenizers)


def pairs_draft(**settings: Any) -> Any:
    return tiny(seed=1, layers=1, vocab=len(THEIRS), **settings)


def text_of(ids: Any) -> str:
    return "".join(LETTERS[index] for index in ids)


def check_same(ours: Run, theirs: Run) -> None:
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert torch.equal(mine.positions, other.positions)
    for name in ("lookahead_ids", "prompt_positions", "shift"):
        mine, other = getattr(ours.cache, name), getattr(theirs.cache, name)
        assert (mine is None) == (other is None), name
        assert mine is None or torch.equal(mine, other), name


def test_one_tokenizer_by_text_is_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a padded batch, ids and scores; and where the prompt fits nobody drafts. The second way compiles nothing."""
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "a test says so")
    how, draft = METHODS["speckvpc"], tiny(seed=1, layers=1)
    usual, model = (compile_eager(tiny(layers=1), how, draft, tokenizers=given) for given in (None, (OURS, OURS)))
    ids, mask = padded(PROMPTS)
    check_same(run(model, ids, mask=mask), run(usual, ids, mask=mask))
    assert run(model, PROMPTS[2][:, :12]).cache.lookahead_ids is None
    assert any("another tokenizer" in note for note in specpass.report(model).notes)


def lookahead_of(draft: Any, ids: torch.Tensor) -> list[int]:
    """What the draft writes behind the text of `ids` [1, S], as the target's ids: letter by letter."""
    read = torch.tensor([THEIRS(text_of(ids[0]))["input_ids"]])
    assert read.shape[1] < ids.shape[1], "pairs of letters are tokens"
    written = run(draft, read, new=L + 1).tokens[0]
    return OURS(THEIRS.decode(written))["input_ids"][:L]


@pytest.fixture(scope="module")
def speckv() -> tuple[Any, Any]:
    draft = pairs_draft()
    return by_text(METHODS["speckv"], draft), draft


def test_the_lookahead_is_the_drafts_text(speckv: tuple[Any, Any]) -> None:
    """Kept, and answered, as with those ids given."""
    model, draft = speckv
    for ids in PROMPTS[:2]:
        ours = run(model, ids)
        assert ours.cache.lookahead_ids[0].tolist() == lookahead_of(draft, ids)
        check_rules(kept(ours.cache), ids.shape[1], C, W)
        check_answer(ours, tiny(layers=1), ids, kept(ours.cache))
        given = run(model, ids, lookahead_ids=ours.cache.lookahead_ids)
        check_same(ours, given)


def test_prompts_without_ids_need_a_lookahead(speckv: tuple[Any, Any]) -> None:
    model = speckv[0]
    embeds = model.get_input_embeddings()(PROMPTS[0]).detach()
    with pytest.raises(errors.UnsupportedCallError, match=r"inputs_embeds.*lookahead_ids=\[B, L\]"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    ahead = torch.tensor([[3, 4, 5]])
    out = model.generate(inputs_embeds=embeds, lookahead_ids=ahead, max_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(out.past_key_values.lookahead_ids, ahead)


def test_scores_are_carried_by_letters() -> None:
    """SpecPC against the eager oracle on the draft's own tokens: each letter has its token's score."""
    how, draft, ids = METHODS["specpc"], pairs_draft(), PROMPTS[0]
    scoring = PromptScoring(**SPECPC)
    cache = specpass.BudgetCache(tiny(layers=1).config, how, max_new_tokens=3)
    run(by_text(how, draft), ids, 3, past_key_values=cache)
    read = THEIRS(text_of(ids[0]))["input_ids"]
    scores = prompt_scores(draft, torch.tensor([read]), scoring)
    each = [score for token, score in zip(read, scores.tolist(), strict=True) for _ in THEIRS.decode([token])]
    due = choose(pooled(torch.tensor(each), scoring), how.budget, scoring)
    assert cache.prompt_positions[0].tolist() == due
    assert cache.lookahead_ids.shape == (1, SPECPC["lookahead"])


def test_the_second_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own forward, pruned around its attention, takes the same; a padded batch's rows are those alone."""
    how, draft = METHODS["speckvpc"], pairs_draft()
    compiled = by_text(how, draft)
    graphs = run(compiled, PROMPTS[0])
    assert [graph.exact for graph in specpass.report(compiled).graphs] == [False, False]
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "a test says so")
    model = by_text(how, draft)
    alone = [run(model, own) for own in PROMPTS[:2]]
    check_same(alone[0], graphs)
    ids, mask = padded(PROMPTS[:2])
    both = run(model, ids, mask=mask)
    for row, own in enumerate(alone):
        assert both.tokens[row] == own.tokens[0]
        for name in ("lookahead_ids", "prompt_positions"):
            assert getattr(both.cache, name)[row].tolist() == getattr(own.cache, name)[0].tolist()


def test_a_draft_that_ends_ends_the_lookahead() -> None:
    ids, draft = PROMPTS[0], pairs_draft()
    read = torch.tensor([THEIRS(text_of(ids[0]))["input_ids"]])
    written = run(draft, read, new=3).tokens[0]
    draft.generation_config.eos_token_id = written[2]
    target = tiny(layers=1, eos=77)
    model = compile_eager(target, METHODS["speckv"], draft, tokenizers=(OURS, THEIRS))
    assert eos_ids(target.generation_config) == (77,)
    before = written[: written.index(written[2])]
    due = [*OURS(THEIRS.decode(before))["input_ids"], 77, *[0] * L][:L]
    cache = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=3)
    call(model, ids, cache)
    assert cache.lookahead_ids[0].tolist() == due


def test_what_cannot_go_with_two_tokenizers() -> None:
    method, draft = METHODS["speckv"], pairs_draft()
    cases: list[tuple[Any, dict[str, Any], Any, str]] = [
        (method, {"speculate": 4}, errors.SpeculationError, "speculate=4.*leave speculate out"),
        (specpass.SpecKV(budget=C, window=W, futures=2), {}, errors.FuturesError, "futures=2.*leave futures out"),
        (specpass.SnapKV(budget=C, window=W), {}, errors.TokenizerMismatchError, "SnapKV has no draft"),
        (method, {"tokenizers": OURS}, errors.TokenizerMismatchError, "expected two"),
        (method, {"tokenizers": (OURS, object())}, errors.TokenizerMismatchError, "draft's tokenizer.*object.*fast"),
    ]
    for how, given, error, text in cases:
        target = tiny(layers=1)
        with pytest.raises(error, match=text):
            compile_eager(target, how, draft, **{"tokenizers": (OURS, THEIRS), **given})
        assert not hasattr(target, "_specpass")
    with pytest.raises(errors.TokenizerMismatchError, match=r"128.*256.*tokenizers=\(the target's"):
        compile_eager(tiny(layers=1), method, tiny(layers=1, vocab=256))


def test_a_draft_that_reads_less_than_the_text() -> None:
    model = by_text(METHODS["speckv"], pairs_draft(max_position_embeddings=30))
    with pytest.raises(errors.DraftContextError, match=r"tokens of the draft's.*at most 30"):
        run(model, PROMPTS[0])


def test_no_document_is_read_for_two_tokenizers(speckv: tuple[Any, Any]) -> None:
    with pytest.raises(errors.PrefixUnsupportedError, match="another tokenizer"):
        specpass.read(speckv[0], PROMPTS[0])
