"""Tiny random decoders some of whose layers recur: states beside a few layers of full attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

# family -> config arguments on top of the shared ones; the kinds of its layers are transformers' own
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {**_DELTA, **_EXPERTS},
    "qwen3_5_text": _DELTA,
    "falcon_h1": {**_MAMBA2, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA2,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 64,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "chunk_size": 16,
        "adapter_rank": 8,
        "use_mem_rope": True,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
}


def hybrid(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of one family in float32 and eval mode; the global generator is left as it was."""
    config = AutoConfig.for_model(family, **{**_SIZES, **HYBRIDS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def states_of(cache: Any) -> list[torch.Tensor]:
    """All convolution and recurrent states of a cache."""
    held = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    states = [state for layer in held for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return [state for state in states if state is not None]
