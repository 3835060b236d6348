"""SpecPC and SpecKV-PC: the tokens that the target reads, against plain eager formulas; turns, batches, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import MARGIN, Run, call, check_answer, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache

import specpass
import specpass.testing.prompt as ep
from specpass.errors import BudgetError, FirstLayerError, LookaheadError, PromptBudgetError, UnsupportedCallError
from specpass.testing import eager

C, W = 40, 8
HOW = ep.PromptScoring(window=W, kernel=6, neighbours=5, lookahead=3)


def spec_pc(how: ep.PromptScoring = HOW, budget: int = C, **options: Any) -> specpass.SpecPC:
    return specpass.SpecPC(budget=budget, **dataclasses.asdict(how), **options)


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny(seed=5, layers=3)


@pytest.fixture(scope="module")
def model(draft: Any) -> Any:
    return compile_eager(tiny(), spec_pc(), draft=draft)


def tokens_read(cache: Any, row: int = 0) -> list[int]:
    positions = cache.prompt_positions[row]
    used = positions[positions >= 0]
    assert torch.equal(positions[: len(used)], used), "unused slots come last"
    return used.tolist()


def check_read(ours: Run, draft: Any, ids: torch.Tensor, how: ep.PromptScoring, row: int = 0, budget: int = C) -> None:
    """The tokens read are the eager ones: as a set, or at equal scores of the peaks."""
    scores = ep.pooled(ep.prompt_scores(draft, ids, how), how)
    assert tokens_read(ours.cache, row) == ep.choose(scores, budget, how)


def check_pc_answer(ours: Run, twin: Any, ids: torch.Tensor, positions: str = "renumber", row: int = 0) -> None:
    theirs = ep.answer(twin, ids, tokens_read(ours.cache, row), len(ours.tokens[row]), positions)
    assert ours.tokens[row] == theirs.tokens
    torch.testing.assert_close(ours.logits[row], theirs.logits, atol=1e-4, rtol=1e-4)


# -- exactness


@pytest.mark.parametrize("length", [C + 1, 70, 131])
def test_the_tokens_read_and_the_answer_are_the_eager_ones(model: Any, twin: Any, draft: Any, length: int) -> None:
    ids = prompt(length, seed=length)
    ours = run(model, ids)
    check_read(ours, draft, ids, HOW)
    check_pc_answer(ours, twin, ids)
    assert ours.cache.get_seq_length() == length + 5  # what generate counts
    lookahead, _ = eager.draft_lookahead(draft, ids, HOW.lookahead)
    assert torch.equal(ours.cache.lookahead_ids, lookahead)
    for layer in ours.cache.layers:
        assert layer.slots == C + 64
        assert (layer.positions == ours.cache.prompt_positions[:, None]).all()


@pytest.mark.parametrize(
    ("how", "positions"),
    [
        (ep.PromptScoring(window=1, kernel=1, neighbours=1, first_layer=0), "original"),
        (ep.PromptScoring(window=5, kernel=7, neighbours=4, lookahead=4, reduce="mean", pool="avg"), "original"),
        (ep.PromptScoring(window=39, kernel=64, neighbours=64, first_layer=2), "renumber"),
    ],
    ids=["one row", "means", "wide"],
)
def test_every_reduction_weight_and_neighbour_rule(
    how: ep.PromptScoring, positions: str, draft: Any, twin: Any
) -> None:
    torch._dynamo.reset()
    model, ids = compile_eager(tiny(), spec_pc(how, positions=positions), draft=draft), prompt(90, seed=7)
    ours = run(model, ids, 4)
    check_read(ours, draft, ids, how)
    check_pc_answer(ours, twin, ids, positions)


@pytest.mark.parametrize(("family", "kind"), [("gemma3", "sliding_attention"), ("llama4", "chunked_attention")])
def test_layers_of_the_draft_with_windows_do_not_score(family: str, kind: str, twin: Any) -> None:
    """Tokens out of their reach would lose to the last ones, whatever they are."""
    torch._dynamo.reset()
    draft = tiny(family, seed=5, layers=4, layer_types=["full_attention", kind, "full_attention", kind])
    model = compile_eager(tiny(), spec_pc(), draft=draft)
    for length in (C + 1, 90):
        ids = prompt(length, seed=length)
        ours = run(model, ids, 2)
        check_read(ours, draft, ids, HOW)
        check_pc_answer(ours, twin, ids)
    assert not specpass.report(model).refusals


@pytest.mark.parametrize("early_exit", [True, False])
def test_a_budget_that_holds_the_prompt_is_exact(model: Any, twin: Any, early_exit: bool) -> None:
    for length in (C, 23):
        ids = prompt(length, seed=length)
        cache = specpass.BudgetCache(model.config, spec_pc(), max_new_tokens=6, early_exit=early_exit)
        ours = run(model, ids, 6, past_key_values=cache)
        check_answer(ours, twin, ids, None)
        assert tokens_read(cache) == list(range(length))


def test_a_padded_batch_equals_its_rows_alone(model: Any, twin: Any, draft: Any) -> None:
    prompts = [prompt(90, seed=1), prompt(61, seed=2), prompt(30, seed=3)]
    ids, mask = padded(prompts)
    together = run(model, ids, 5, mask)
    for row, own in enumerate(prompts):
        check_pc_answer(together, twin, own, row=row)
        check_read(together, draft, own, HOW, row)
        alone = run(model, own, 5)
        assert together.tokens[row] == alone.tokens[0]
        if own.shape[1] > C:  # a shorter one is not drafted for, alone
            assert torch.equal(together.cache.lookahead_ids[row], alone.cache.lookahead_ids[0])


def test_rows_behind_the_drafts_eos_do_not_score(twin: Any) -> None:
    torch._dynamo.reset()
    ids, how = prompt(90, seed=4), dataclasses.replace(HOW, lookahead=5)
    plain = eager.draft_lookahead(tiny(seed=5, layers=3), ids, 5)[0][0].tolist()
    ending = tiny(seed=5, layers=3, eos=plain[1])
    model = compile_eager(tiny(), spec_pc(how), draft=ending)
    ours = run(model, ids, 3)
    assert ours.cache.lookahead_ids[0, 2:].tolist() == [0, 0, 0]
    scores = [ep.prompt_scores(tiny(seed=5, layers=3, eos=eos), ids, how) for eos in (plain[1], None)]
    assert not torch.equal(*scores), "the case would not show the rule"
    check_read(ours, ending, ids, how)


def test_the_plain_door(draft: Any, twin: Any) -> None:
    """Direct calls without position ids: the cache reconciles what it counts with what the target was told."""
    for positions in ("renumber", "original"):
        torch._dynamo.reset()
        target, method, ids = tiny(), spec_pc(positions=positions), prompt(80, seed=8)
        target.compile(backend=specpass.Backend(draft=draft, method=method, lowering="eager"), dynamic=True)
        cache = specpass.BudgetCache(target.config, method, max_new_tokens=5)
        logits = [call(target, ids, cache)]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < 5:
            logits.append(call(target, torch.tensor([[tokens[-1]]]), cache))
            tokens.append(int(logits[-1].argmax()))
        check_pc_answer(Run([tokens], torch.cat(logits, 1), cache), twin, ids, positions)


# -- SpecKV-PC

KV, ROWS, L = 24, 6, 4


@pytest.fixture(scope="module")
def both(draft: Any) -> Any:
    method = specpass.SpecKVPC(
        budget=KV, window=ROWS, lookahead=L, prompt_budget=C, prompt_window=W, prompt_kernel=6, neighbours=5
    )
    return compile_eager(tiny(), method, draft=draft)


@pytest.mark.parametrize("length", [90, C + 1, C - 1, KV + 1])
def test_speckv_on_the_compressed_prompt(both: Any, twin: Any, draft: Any, length: int) -> None:
    ids, how = prompt(length, seed=length), dataclasses.replace(HOW, lookahead=L)
    ours = run(both, ids, 5)
    check_read(ours, draft, ids, how)
    lookahead, valid = eager.draft_lookahead(draft, ids, L)
    assert torch.equal(ours.cache.lookahead_ids, lookahead)
    read = torch.tensor(tokens_read(ours.cache))
    compressed = [torch.searchsorted(read, layer) for layer in kept(ours.cache)]
    for layer, numbered in zip(compressed, kept(ours.cache), strict=True):
        assert torch.equal(read[layer], numbered)  # by the original prompt
    chosen = eager.select(twin, ids[:, read], KV, lookahead[:, :valid], eager.Scoring(window=ROWS))
    check_selection(compressed, chosen, ROWS)
    check_answer(ours, twin, ids[:, read], compressed)


def test_speckv_pc_batches_and_short_prompts(both: Any, twin: Any) -> None:
    check_answer(run(both, prompt(KV, seed=6), 5), twin, prompt(KV, seed=6), None)
    prompts = [prompt(90, seed=1), prompt(35, seed=2), prompt(20, seed=3)]
    ids, mask = padded(prompts)
    together = run(both, ids, 5, mask)
    for row, own in enumerate(prompts):
        alone = run(both, own, 5)
        assert together.tokens[row] == alone.tokens[0]
        for ours, theirs in zip(kept(together.cache, row), kept(alone.cache), strict=True):
            assert torch.equal(ours, theirs)


# -- turns


def converse(twin: Any, ids: torch.Tensor, read: list[int], turns: list[torch.Tensor]) -> list[torch.Tensor]:
    """Eager logits of the last position after the gathered prompt and after each turn, renumbered."""
    cache, seen, at = DynamicCache(), [], 0
    for tokens in [ids[:, read], *turns]:
        position = torch.arange(at, at + tokens.shape[1])[None]
        seen.append(twin(input_ids=tokens, position_ids=position, past_key_values=cache).logits[:, -1:])
        at += tokens.shape[1]
    return seen


def test_three_turns_in_two_interleaved_conversations(model: Any, twin: Any) -> None:
    prompts = [prompt(90, seed=21), prompt(75, seed=22)]
    turns = [[prompt(n, seed=30 + n + i) for n in (7, 1, 12)] for i in (0, 1)]
    caches = [specpass.BudgetCache(model.config, spec_pc(), max_new_tokens=40) for _ in prompts]
    seen: list[list[torch.Tensor]] = [[], []]
    for step in range(4):
        for which in (0, 1):
            tokens = prompts[which] if step == 0 else turns[which][step - 1]
            seen[which].append(call(model, tokens, caches[which]))
    for which in (0, 1):
        expected = converse(twin, prompts[which], tokens_read(caches[which]), turns[which])
        torch.testing.assert_close(torch.cat(seen[which], 1), torch.cat(expected, 1), atol=1e-4, rtol=1e-4)
        assert caches[which].get_seq_length() == prompts[which].shape[1] + 20


def test_generate_goes_on_and_crop_takes_back(model: Any, twin: Any) -> None:
    ids, turn = prompt(90, seed=23), prompt(9, seed=24)
    cache = specpass.BudgetCache(model.config, spec_pc(), max_new_tokens=64)
    first = torch.tensor(run(model, ids, 5, past_key_values=cache).tokens)
    second = run(model, torch.cat([ids, first, turn], 1), 5, past_key_values=cache)
    said = torch.tensor(second.tokens)
    expected = converse(twin, ids, tokens_read(cache), [first, turn, *said[:, :4].split(1, 1)])
    torch.testing.assert_close(second.logits, torch.cat(expected[2:], 1), atol=1e-4, rtol=1e-4)
    cache.crop(4)  # the second answer, of which the last token is not stored
    again = run(model, torch.cat([ids, first, turn, said[:, :1]], 1), 4, past_key_values=cache)
    assert again.tokens[0] == second.tokens[0][1:]
    cache.reset()
    assert cache.prompt_positions is None
    anew = run(model, torch.cat([ids, first, turn], 1), 4, past_key_values=cache)
    check_pc_answer(anew, twin, torch.cat([ids, first, turn], 1))


def test_beams_and_samples(model: Any) -> None:
    ids = prompt(80, seed=25)
    beams = model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False)
    assert beams.shape == (1, 85)
    torch.manual_seed(3)
    first = model.generate(ids, max_new_tokens=5, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(ids, max_new_tokens=5, do_sample=True))


# -- one graph, memory, the list of neighbours


def test_one_static_graph_for_every_longer_prompt(draft: Any) -> None:
    torch._dynamo.reset()
    model = tiny()
    backend = specpass.Backend(draft=draft, method=spec_pc(), lowering="eager", keep_stages=("PRUNED",))
    model.compile(backend=backend, dynamic=True)
    for length in (50, 77, 130):
        call(model, prompt(length), specpass.BudgetCache(model.config, spec_pc(), max_new_tokens=3))
    assert [record.kind for record in backend.report.graphs] == ["prefill"]
    graph = backend.stages["PRUNED"].graph
    sites = [node for node in graph.nodes if "prefill_attention" in str(node.target)]
    assert [tuple(node.meta["val"].shape) for node in sites] == [(1, 4, C, 16)] * 2
    mode = sites[0].meta["val"].fake_mode
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    with mode:
        results = torch.fx.Interpreter(backend.stages["PRUNED"]).run(*values)  # a host synchronisation would raise
    assert (1, C) in [tuple(result.shape) for result in results if isinstance(result, torch.Tensor)]


@given(st.data())
def test_select_prompt_is_the_list_built_one_by_one(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 5))
    how = ep.PromptScoring(
        window,
        kernel=data.draw(st.integers(1, 9)),
        neighbours=data.draw(st.integers(1, 9)),
        pool=data.draw(st.sampled_from(["max", "avg"])),
    )
    budget = data.draw(st.integers(window + 1, 20))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    columns = max(lengths) + data.draw(st.integers(0, 4))
    scores = torch.zeros(len(lengths), columns)
    for row, length in enumerate(lengths):  # four values: ties everywhere
        scores[row, :length] = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
    chosen = torch.ops.specpass.select_prompt(
        scores, torch.tensor(lengths), budget, window, how.kernel, how.neighbours, how.pool
    )
    for row, length in enumerate(lengths):
        expected = ep.choose(ep.pooled(scores[row, :length], how), budget, how)
        assert chosen[row].tolist() == expected + [-1] * (budget - len(expected))


def test_without_its_draft_the_prompt_is_read_whole(draft: Any, twin: Any) -> None:
    torch._dynamo.reset()
    model, ids = compile_eager(tiny(), spec_pc(), draft=draft, skip_passes=["insert_draft"]), prompt(60, seed=9)
    check_answer(run(model, ids, 3), twin, ids, None)
    assert "insert_draft is skipped" in str(specpass.report(model))


# -- PyramidKV


@pytest.mark.parametrize(("budget", "layers"), [(24, 3), (40, 7), (9, 4), (256, 28), (64, 1)])
def test_pyramid_budgets_fall_and_keep_the_total(budget: int, layers: int) -> None:
    budgets = specpass.PyramidKV(budget=budget, window=8).layer_budgets(layers)
    assert sum(budgets) == budget * layers
    assert list(budgets) == sorted(budgets, reverse=True)
    assert min(budgets) > 8
    line = torch.linspace(budgets[0], budgets[-1], layers)
    assert (torch.tensor(budgets) - line).abs().max() <= 1.5  # each end and each budget is rounded


def test_pyramid_layers_keep_their_own_budget(twin: Any) -> None:
    torch._dynamo.reset()
    method = specpass.PyramidKV(budget=24, window=6)
    model = compile_eager(tiny(), method)
    how = eager.Scoring(window=6, reduce="mean", pool="avg")
    prompts = [prompt(90, seed=1), prompt(30, seed=2), prompt(12, seed=3)]
    ids, mask = padded(prompts)
    together = run(model, ids, 5, mask)
    for row, own in enumerate(prompts):
        alone = run(model, own, 5)
        check_answer(alone, twin, own, kept(alone.cache))
        assert together.tokens[row] == alone.tokens[0]
        for index, budget in enumerate(method.layer_budgets(2)):
            ours = kept(together.cache, row)[index] if own.shape[1] <= 24 else alone.cache.layers[index].positions[0]
            if own.shape[1] > budget and own.shape[1] > 24:
                scores = eager.select(twin, own, budget, how=how).scores[index]
                assert eager.score_margin(scores, ours, 6) >= MARGIN
                assert ours.shape[1] == budget
    assert (together.cache.layers[1].positions[2] >= 0).sum(-1).tolist() == [12, 12]  # a row that fits keeps all


# -- errors


@pytest.mark.parametrize(
    ("make", "error", "texts"),
    [
        (lambda: specpass.SpecKVPC(budget=1024, prompt_budget=512), PromptBudgetError, ["512", "1024"]),
        (lambda: specpass.SpecKVPC(budget=64, window=65), BudgetError, ["64"]),
        (lambda: specpass.SpecKVPC(budget=256, window=96), PromptBudgetError, ["96", "prompt_window"]),
        (lambda: specpass.SpecKVPC(budget=64, lookahead_ids=[[1]]), LookaheadError, ["SpecKV"]),
        (lambda: specpass.SpecPC(budget=64), BudgetError, ["window=64"]),
        (lambda: specpass.SpecPC(budget=128, neighbours=0), BudgetError, ["neighbours=0"]),
        (lambda: specpass.SpecPC(budget=128, kernel=0), BudgetError, ["kernel=0"]),
        (lambda: specpass.SpecPC(budget=128, first_layer=-1), BudgetError, ["first_layer=-1"]),
        (lambda: specpass.SpecPC(budget=128, positions="rope"), BudgetError, ["renumber"]),
        (lambda: specpass.SpecPC(budget=128, reduce="sum"), BudgetError, ["mean"]),
        (lambda: specpass.PyramidKV(budget=64, beta=0), BudgetError, ["beta=0"]),
    ],
)
def test_arguments(make: Any, error: type[Exception], texts: list[str]) -> None:
    with pytest.raises(error) as raised:
        make()
    assert all(text in str(raised.value) for text in texts)


def test_a_first_layer_beyond_the_drafts_depth(draft: Any) -> None:
    model = tiny()
    with pytest.raises(FirstLayerError, match="first_layer=3, but the draft has 3 layers"):
        compile_eager(model, spec_pc(dataclasses.replace(HOW, first_layer=3)), draft=draft)
    assert "_specpass" not in model.__dict__


def test_lookahead_ids_cannot_take_the_drafts_place(model: Any) -> None:
    with pytest.raises(LookaheadError, match="SpecPC"):
        specpass.BudgetCache(model.config, spec_pc(), lookahead_ids=[[1, 2]])
    with pytest.raises(LookaheadError, match="SpecPC"):
        specpass.Backend(tiny(), spec_pc(), lookahead_ids=[[1, 2]])


def test_logits_of_positions_that_were_not_read(model: Any) -> None:
    cache = specpass.BudgetCache(model.config, spec_pc(), max_new_tokens=3)
    with pytest.raises(UnsupportedCallError, match="logits_to_keep=1"):
        call(model, prompt(90), cache, logits_to_keep=0)
