"""A family's default config, made tiny: known fields get small values, whatever the family calls them.

`SIZES` says what a field becomes where the family has it and does not leave it None; `OVERRIDES` what else a family
needs, mostly because sizes must fit each other. Weights are drawn wide, so that greedy tokens and attention vary.
"""

from __future__ import annotations

import inspect
from typing import Any

VOCAB = 128
PAD = 0
WINDOW = 16  # of sliding layers, shorter than the prompts
SPREAD = 0.25
LAYERS = 2
LARGEST = 20_000_000  # parameters

_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
    (64, "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim lru_width ffn_hidden_size"),
    (96, "intermediate_size ffn_dim n_inner d_ff dim_ff intermediate_size_mlp dense_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_query_heads swa_num_attention_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_experts_per_tok moe_k moe_topk moe_top_k num_experts_per_token top_k_experts"),
    (2, "swa_num_key_value_heads n_activated_experts experts_per_token"),
    (16, "head_dim kv_lora_rank qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head"),
    (16, "mamba_d_state mamba_head_dim ssm_state_size state_size rope_head_dim index_head_dim kv_channels d_kv"),
    (16, "hidden_size_per_layer_input mamba_chunk_size chunk_size global_head_dim swa_head_dim swa_v_head_dim"),
    (WINDOW, "sliding_window attention_chunk_size attention_window_size window_size sliding_window_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank expert_ffn_hidden_size"),
    (32, "moe_shared_expert_intermediate_size shared_intermediate_size mamba_intermediate_size"),
    (32, "shared_experts_intermediate_size"),
    (8, "qk_rope_head_dim mamba_n_heads mamba_num_heads index_topk"),
    (1, "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups num_shared_experts"),
    (0, "num_nextn_predict_layers mtp_num_hidden_layers"),
    (1024, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (SPREAD, "initializer_range init_std initializer_std"),
)
SIZES: dict[str, Any] = {name: value for value, names in _NAMES for name in names.split()} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rotary_dim": 8,
    "pad_token_id": PAD,
}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
_SHARED = {  # the last two layers read the keys and values of the first two
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_WINDOWS = {  # whose default config has none, as released ones do
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_group": 1, "n_group": 1},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **_MAMBA},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _WINDOWS | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "gemma3n_text": _SHARED | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["mamba", "full_attention"] * 2, **_MAMBA},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2, "moe_topk": 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": _WINDOWS,
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": _WINDOWS,
    "ministral": {"head_dim": 16, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mpt": {"use_cache": True, "max_seq_len": 2048},  # longer than the sizes that a draft is traced at
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "smollm3": {"no_rope_layers": [1, 0]},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def defaults_of(config_class: Any) -> dict[str, Any]:
    """The fields of a family's default config."""
    return config_class().to_dict()


def tiny_settings(family: str, config_class: Any) -> dict[str, Any]:
    """Arguments that make a tiny config of `config_class`."""
    default = defaults_of(config_class)
    accepted = set(inspect.signature(config_class.__init__).parameters) | set(default)
    settings = {
        name: value
        for name, value in SIZES.items()
        if name in accepted and (default.get(name) is not None or name == "pad_token_id")
    }
    if "kv_lora_rank" in settings:  # multi-head latent attention: the rotary part of a head has a size of its own
        settings |= {"num_key_value_heads": settings["num_attention_heads"], "head_dim": settings["qk_rope_head_dim"]}
    kinds = list(dict.fromkeys(default.get("layer_types") or ()))
    if kinds:
        others = [kind for kind in kinds if kind != "full_attention"]
        ends = ["full_attention"] if "full_attention" in kinds else others[:1]
        settings["layer_types"] = [*ends, *others, *ends]
        depth = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in settings)
        settings[depth] = len(settings["layer_types"])
    return settings | OVERRIDES.get(family, {})


class TooLargeError(Exception):
    """The family has sizes that `SIZES` does not know."""


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random float32 model of a family in eval mode, that never stops by itself.

    Raises: TooLargeError, and whatever the family's classes raise.
    """
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config_class = CONFIG_MAPPING[family]
    config = config_class(**tiny_settings(family, config_class))
    make = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    with torch.device("meta"):
        size = sum(weight.numel() for weight in make(config).parameters())
    if size > LARGEST:
        raise TooLargeError(f"{size:,} parameters with every known size made small")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config).to(torch.float32).eval().requires_grad_(False)
    for name in ("bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, None)
    model.generation_config.pad_token_id = PAD
    return model
