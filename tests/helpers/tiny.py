"""Tiny random decoders, made from configs alone (no network), float32, seeded, in eval mode.

`FULL` are plain decoders; `OTHERS` have sliding windows, chunks, soft caps, sinks, learned positions, ALiBi, or masks
made of values (Doge). Weights are drawn wide (initializer_range 0.25): at the usual 0.02 attention is uniform, every
pooled score ties, and a wrong selection would go unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
PAD = 0
SPREAD = 0.25

_ROTARY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}

_GEMMA2: dict[str, Any] = {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}

# family -> (transformers prefix, config arguments on top of the shared ones)
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _ROTARY),
    "qwen2": ("Qwen2", {k: v for k, v in _ROTARY.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", _ROTARY),
    "smollm": ("Llama", {**_ROTARY, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {k: v for k, v in _ROTARY.items() if k != "head_dim"}),
    "mistral": ("Mistral", {**_ROTARY, "sliding_window": None}),
}

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-sliding": ("Mistral", {**_ROTARY, "sliding_window": 24}),
    "gemma2": ("Gemma2", {**_ROTARY, "sliding_window": 24, **_GEMMA2}),
    "gpt-oss": ("GptOss", {**_ROTARY, "sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma3": ("Gemma3Text", {**_ROTARY, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "llama4": (
        "Llama4Text",
        {
            **_ROTARY,
            "attention_chunk_size": 24,
            "intermediate_size_mlp": 96,
            "moe_layers": [],
            "num_local_experts": 2,
            "attn_temperature_tuning": False,
        },
    ),
    "lfm2": (
        "Lfm2",
        {k: v for k, v in _ROTARY.items() if k != "head_dim"} | {"layer_types": ["conv", "full_attention"]},
    ),
    "bloom": ("Bloom", {"hidden_size": 64, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "max_seq_len": 2048, "use_cache": True}),
    "falcon-alibi": ("Falcon", {"hidden_size": 64, "num_attention_heads": 4, "alibi": True}),
    "doge": ("Doge", {k: v for k, v in _ROTARY.items() if k != "head_dim"}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_inner": 96, "n_head": 4, "n_positions": 512}),
    "opt": (
        "OPT",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
        },
    ),
}

# Decoders whose last layer sorts tokens by expert.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_ROTARY, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_ROTARY,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "olmoe": ("Olmoe", {**_ROTARY, "num_experts": 4, "num_experts_per_tok": 2}),
}
EAGER = ("gemma2", "gpt-oss", "bloom", "mpt")
ALIBI = ("bloom", "mpt", "falcon-alibi")


def tiny(
    family: str = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    vocab: int = VOCAB,
    eos: int | list[int] | None = None,
    attention: str | None = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of one family: hidden 64, H 4, K 2 (K 4 for GPT-2 and OPT), D 16.

    Args:
        family: a key of `FULL`, `OTHERS` or `EXPERTS`.
        seed: seeds the weights; the global generator is left as it was.
        eos: end-of-sequence ids; None never stops.
        attention: attn_implementation; always "eager" for the `EAGER` families, whose soft caps and sinks have no SDPA
            form.
        overrides: further config arguments, e.g. `num_key_value_heads=1`; a tuple stands for a list.

    Raises:
        KeyError: an unknown family.
    """
    prefix, shared = {**FULL, **OTHERS, **EXPERTS}[family]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(
        transformers, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix.removesuffix('Text')}ForCausalLM"
    )
    depth = "n_layer" if prefix == "GPT2" else "num_hidden_layers"
    spread = "init_std" if prefix == "OPT" else "initializer_range"
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": PAD}
    settings = {**shared, depth: layers, spread: SPREAD, "vocab_size": vocab, **ids, **overrides}
    settings |= {name: list(value) for name, value in overrides.items() if isinstance(value, tuple)}
    config = config_class(**settings)
    config._attn_implementation = "eager" if family in EAGER else attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        if path.endswith(("q_norm.weight", "k_norm.weight")):  # unit norms would bound the scores of Qwen3
            parameter.mul_(2.0)
    for field, value in ids.items():
        setattr(model.generation_config, field, value)
    return model


def tiny_pair(family: str = "llama", *, seed: int = 0, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(target of 3 layers, draft of 2 layers) of one family and vocabulary, with different weights."""
    return (tiny(family, seed=seed, layers=3, **settings), tiny(family, seed=seed + 1000, layers=2, **settings))


def prompt(length: int, *, batch: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random prompt ids [B, S], never the pad id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (batch, length), generator=generator)
