"""Real weights: SmolLM2-135M in float32 as its own draft, and the Qwen pair in the dtype that users run it in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run, call, check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import specpass
import specpass.testing.prompt as ep
from bench import needles, weak_draft
from specpass import hub
from specpass.kernels.cpu.isa import multiplies
from specpass.testing import eager

pytestmark = pytest.mark.real
SMOL = pytest.mark.xdist_group("smol")  # they share a compiled model, so one process runs them

C, W, L = 128, 32, 8


def load(name: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(hub.model_path(name), dtype=dtype).eval().requires_grad_(False)


@dataclasses.dataclass
class Smol:
    """A compiled model, an uncompiled twin, and real prompts of about 400 and 250 tokens."""

    model: Any
    twin: Any
    long: torch.Tensor
    middle: torch.Tensor
    short: torch.Tensor
    method: specpass.SpecKV


@pytest.fixture(scope="module")
def smol() -> Smol:
    model, twin = (load("smollm2-135m", torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(hub.model_path("smollm2-135m"))
    prompts = [
        torch.tensor([needles.make_prompt("multikey", seed, tokens, tokenizer).ids])
        for seed, tokens in ((0, 400), (1, 250), (2, 110))
    ]
    method = specpass.SpecKV(budget=C, window=W, lookahead=L)
    assert abs(prompts[0].shape[1] - 400) < 30
    assert prompts[2].shape[1] <= C
    return Smol(compile_eager(model, method, draft=model), twin, *prompts, method)


@pytest.fixture(scope="module")
def alone(smol: Smol) -> Run:
    """The long prompt run alone, drafted by the model itself."""
    return run(smol.model, smol.long, L)


@pytest.fixture(scope="module")
def shallow() -> tuple[Any, Any]:
    """A model to compile and its twin, both of the first eleven layers and the last: tracing costs by the layer."""
    models = [load("smollm2-135m", torch.float32) for _ in range(2)]
    for model in models:
        weak_draft.cut(model, 12)
    return models[0], models[1]


@SMOL
def test_all_thirty_layers_are_rewritten(smol: Smol, alone: Run) -> None:
    report = specpass.report(smol.model)
    assert not report.refusals
    assert {record.kind: len(record.sites) for record in report.graphs} == {"prefill": 30, "decode": 30}


@SMOL
def test_kept_sets_and_tokens_are_the_eager_ones(smol: Smol, alone: Run) -> None:
    lookahead, valid = eager.draft_lookahead(smol.twin, smol.long, L, smol.twin.generation_config.pad_token_id)
    assert torch.equal(alone.cache.lookahead_ids, lookahead)
    reference = eager.select(smol.twin, smol.long, C, lookahead[:, :valid], eager.Scoring(window=W))
    check_rules(kept(alone.cache), smol.long.shape[1], C, W)
    check_selection(kept(alone.cache), reference, W)
    check_answer(alone, smol.twin, smol.long, kept(alone.cache), tolerance=1e-3)


@SMOL
def test_the_self_draft_is_the_oracle(smol: Smol, alone: Run) -> None:
    answer = run(smol.twin, smol.long, L).tokens
    assert alone.cache.lookahead_ids.tolist() == answer
    cache = specpass.BudgetCache(smol.model.config, smol.method, max_new_tokens=L, lookahead_ids=answer)
    call(smol.model, smol.long, cache)
    for ours, theirs in zip(kept(alone.cache), kept(cache), strict=True):
        assert torch.equal(ours, theirs)


@SMOL
@pytest.mark.parametrize("early_exit", [True, False])
def test_a_budget_that_holds_the_prompt_is_exact(smol: Smol, early_exit: bool) -> None:
    cache = specpass.BudgetCache(smol.model.config, smol.method, max_new_tokens=12, early_exit=early_exit)
    ours, full = run(smol.model, smol.short, 12, past_key_values=cache), run(smol.twin, smol.short, 12)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-3, rtol=1e-3)


@SMOL
def test_a_padded_batch_of_two(smol: Smol, alone: Run) -> None:
    ids, mask = padded([smol.long, smol.middle])
    together = run(smol.model, ids, L, mask)
    for row, (own, one) in enumerate(((smol.long, alone), (smol.middle, run(smol.model, smol.middle, L)))):
        for ours, theirs in zip(kept(together.cache, row), kept(one.cache), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(together.cache.lookahead_ids[row], one.cache.lookahead_ids[0])
        assert together.tokens[row] == one.tokens[0]
        check_rules(kept(together.cache, row), own.shape[1], C, W)


@SMOL
def test_snapkv(smol: Smol, shallow: tuple[Any, Any]) -> None:
    model, twin = shallow
    ours = run(compile_eager(model, specpass.SnapKV(budget=C, window=W)), smol.long, 4)
    reference = eager.select(twin, smol.long, C, how=dataclasses.replace(eager.SNAPKV, window=W))
    check_selection(kept(ours.cache), reference, W)
    check_answer(ours, twin, smol.long, kept(ours.cache), tolerance=1e-3)


@SMOL
def test_specpc_and_speckv_pc(smol: Smol, shallow: tuple[Any, Any]) -> None:
    """The tokens read are the eager ones, the model's own attention scoring; then SpecKV on what was read."""
    model, twin = shallow
    how = ep.PromptScoring(window=32, kernel=32, neighbours=32, lookahead=2)
    method = specpass.SpecPC(budget=160, **dataclasses.asdict(how))
    ours = run(compile_eager(model, method, draft=model), smol.long, 4)
    read = ep.choose(ep.pooled(ep.prompt_scores(twin, smol.long, how), how), 160, how)
    assert ours.cache.prompt_positions[0].tolist() == read
    theirs = ep.answer(twin, smol.long, read, 4)
    assert ours.tokens[0] == theirs.tokens
    torch.testing.assert_close(ours.logits[0], theirs.logits, atol=1e-3, rtol=1e-3)

    both = specpass.SpecKVPC(budget=64, window=W, lookahead=2, prompt_budget=160, prompt_window=32)
    ours = run(compile_eager(model, both, draft=model), smol.long, 4)
    assert ours.cache.prompt_positions[0].tolist() == read
    short = smol.long[:, torch.tensor(read)]
    slots = [torch.searchsorted(torch.tensor(read), layer) for layer in kept(ours.cache)]
    reference = eager.select(twin, short, 64, ours.cache.lookahead_ids, eager.Scoring(window=W))
    check_selection(slots, reference, W)
    check_answer(ours, twin, short, slots, tolerance=1e-3)


# -- the pair


def test_the_qwen_pair_answers_lookups_from_96_slots() -> None:
    """Every line is a needle, 800 tokens: full KV finds it, and SpecKV gives the eager formulas' own right answer."""
    budget, lookahead, new = 96, 16, 12
    dtype = torch.bfloat16 if multiplies(torch.bfloat16) else torch.float32
    target, draft = load("qwen2.5-coder-1.5b", dtype), load("qwen2.5-coder-0.5b", dtype)
    tokenizer = AutoTokenizer.from_pretrained(hub.model_path("qwen2.5-coder-1.5b"))
    prompts = [needles.make_prompt("multikey", seed, 800, tokenizer) for seed in (0, 1)]
    vocab = min(target.config.vocab_size, draft.config.vocab_size)

    def score(tokens: list[int], prompt: needles.Prompt) -> float:
        return needles.score(tokenizer.decode(tokens, skip_special_tokens=True), prompt.answers)

    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        start = eager.prefill(target, ids, W)
        assert score(eager.generate(target, ids, None, new, start=start).tokens, prompt) == 1.0
        drafted, valid = eager.draft_lookahead(draft, ids, lookahead, tokenizer.pad_token_id, vocab_size=vocab)
        chosen = eager.select_shared(start, budget, drafted[:, :valid], eager.Scoring(window=W))
        due = eager.generate(target, ids, chosen.positions, new, start=start, ahead=drafted[0, :valid].tolist())
        expected.append((drafted, due.tokens))

    model = specpass.compile(
        target, draft=draft, lowering="inductor", method=specpass.SpecKV(budget=budget, window=W, lookahead=lookahead)
    )
    for prompt, (drafted, tokens) in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt.ids])
        ours = run(model, ids, new, repetition_penalty=1.0)
        check_rules(kept(ours.cache), ids.shape[1], budget, W)
        assert torch.equal(ours.cache.lookahead_ids, drafted)
        assert ours.tokens[0] == tokens
        assert score(tokens, prompt) == 1.0
    report = specpass.report(model)
    assert not report.refusals
    assert {record.kind: len(record.sites) for record in report.graphs} == {"prefill": 28, "decode": 28}


# -- exported


@SMOL
def test_smollm2_as_its_own_draft_in_onnx_runtime(smol: Smol, alone: Run, tmp_path: Path) -> None:
    """Tokens, lookahead and every kept position of the long prompt are torch.compile's; the short one is as alone."""
    runtime = pytest.importorskip("specpass.runtime")
    pytest.importorskip("onnxruntime")
    model = runtime.load(specpass.export_onnx(smol.twin, smol.twin, smol.method, tmp_path / "out"))
    prompts = [smol.long[0].tolist(), smol.short[0].tolist()]
    both = model.generate(prompts, max_new_tokens=L)
    assert model.generate(prompts[1:], max_new_tokens=L) == both[1:]
    state = model.prefill(prompts[:1])
    assert both[0] == alone.tokens[0]
    assert state.lookahead_ids.tolist() == alone.cache.lookahead_ids.tolist()
    for theirs, layer in zip(state.positions, alone.cache.layers, strict=True):
        assert theirs.tolist() == layer.positions.tolist()


# -- a hybrid


def test_gemma3_prunes_its_full_layers_and_leaves_its_windows_exact() -> None:
    """18 layers: 3 of full attention keep C slots, 15 slide; a budget that holds the prompt is full KV's answer."""
    model, twin = (load("gemma3-270m", torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(hub.model_path("gemma3-270m"))
    text = "The capital of France is Paris. The capital of Italy is Rome. " * 50
    ids = tokenizer(f"{text}The capital of Spain is", return_tensors="pt").input_ids
    assert ids.shape[1] > 512  # the window
    method = specpass.SnapKV(budget=C, window=W)
    pruned = run(compile_eager(model, method), ids, 6)
    report = specpass.report(model)
    assert not report.refusals
    for graph in report.graphs:
        exact = [site.exact for site in graph.sites]
        assert [index for index, reason in enumerate(exact) if not reason] == [5, 11, 17]
        assert exact.count("sliding window 512") == 15
    full = [pruned.cache.layers[index] for index in (5, 11, 17)]
    assert all(int(layer.lengths.max()) <= C + 6 for layer in full)
    assert all(layer.positions.shape[-1] == C for layer in full)

    covering = run(compile_eager(model, specpass.SnapKV(budget=1024, window=W)), ids, 6)
    whole = run(twin, ids, 6)
    assert covering.tokens == whole.tokens
    torch.testing.assert_close(covering.logits, whole.logits, atol=1e-3, rtol=1e-3)
