"""Families with a spelling of their own: exact at a covering budget through the gather, padded rows as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import compile_eager, kept, padded, run
from tiny import prompt

import specpass
from specpass import errors

C, W, L = 24, 8, 5
IDS = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
_ROTARY = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
_GPT = {"n_embd": 64, "n_inner": 96, "n_head": 4, "n_positions": 512, "n_layer": 1, "rotary_dim": 8}
_MLA = {
    **_SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
# One layer where layers do not differ: tracing costs by the layer.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chunked gate (phi3)": ("Phi3", {**_ROTARY, "num_hidden_layers": 1}),
    "norms around (glm4)": ("Glm4", {**_ROTARY, "num_hidden_layers": 1, "head_dim": 16}),
    "permuted heads (falcon)": (
        "Falcon",
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "num_kv_heads": 2, "alibi": False}
        | {"new_decoder_architecture": True},
    ),
    "casts (gptj)": ("GPTJ", _GPT),
    "mask before scale (codegen)": ("CodeGen", _GPT),
    "mask as a buffer (gpt_neo)": (
        "GPTNeo",
        {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
        | {"max_position_embeddings": 2048, "window_size": 16},  # one mask for layers of unlike slots
    ),
    "latents (deepseek_v3)": ("DeepseekV3", _MLA),
    "two attentions (diffllama)": ("DiffLlama", {**_ROTARY, "head_dim": 16}),
    "size handed over twice (opt)": (
        "OPT",
        {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "num_hidden_layers": 1, "word_embed_proj_dim": 64},
    ),
}
EAGER = ("GPTJ", "CodeGen", "GPTNeo")


def build(prefix: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**settings, initializer_range=0.2, init_std=0.2, **IDS)
    config._attn_implementation = "eager" if prefix in EAGER else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval().requires_grad_(False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, IDS[name])
    return model


def cache_of(model: Any, method: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, max_new_tokens=6, early_exit=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_exact_and_rows_apart(name: str) -> None:
    torch._dynamo.reset()
    method = specpass.SnapKV(budget=C, window=W)
    twin, model = build(*FAMILIES[name]), compile_eager(build(*FAMILIES[name]), method)
    ids = prompt(C, seed=3)
    ours, full = run(model, ids, past_key_values=cache_of(model, method)), run(twin, ids)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-3, rtol=1e-4)
    rows = [prompt(length, seed=length) for length in (60, 33, W - 3)]
    batch, mask = padded(rows)
    together = run(model, batch, 4, mask=mask)
    for row, own in enumerate(rows):
        alone = run(model, own, 4)
        assert together.tokens[row] == alone.tokens[0]
        assert all(torch.equal(a, b) for a, b in zip(kept(together.cache, row), kept(alone.cache), strict=True))
    assert run(model, prompt(1, seed=5)).tokens == run(twin, prompt(1, seed=5)).tokens
    assert not specpass.report(model).refusals


@pytest.mark.parametrize("name", ["latents (deepseek_v3)", "size handed over twice (opt)"])
def test_a_lookahead_of_the_target_itself_at_two_lengths(name: str) -> None:
    torch._dynamo.reset()
    method = specpass.SpecKV(budget=C, window=W, lookahead=L)
    target, twin = build(*FAMILIES[name]), build(*FAMILIES[name])
    model = compile_eager(target, method, draft=target)
    ids = prompt(C, seed=3)
    assert run(model, ids, past_key_values=cache_of(model, method)).tokens == run(twin, ids).tokens
    longer = prompt(57, seed=1)
    assert run(model, longer).cache.lookahead_ids.tolist() == run(twin, longer, L).tokens
    assert not specpass.report(model).refusals


def test_evictions_that_go_by_attention_name_latents() -> None:
    method = specpass.SnapKV(budget=C, window=W)
    model = compile_eager(build(*FAMILIES["latents (deepseek_v3)"]), method, generated=16, evict="attention")
    with pytest.raises(errors.GeneratedError, match=r"evict='attention': attention of model\.layers\.0.* \(MLA\)"):
        run(model, prompt(57), 2)
