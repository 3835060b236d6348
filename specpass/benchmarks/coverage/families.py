"""The families that transformers registers for causal language models, and which of them are no text decoders."""

from __future__ import annotations

# Encoders can be told to mask like a decoder: nobody gives them long prompts, and positions end at 512.
_LEFT_OUT = {
    "an encoder": "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod",
    "half of an encoder-decoder": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
    "prophetnet trocr whisper",
    "bytes in patches, encoded by a model of their own": "blt",
    "drafts for another model, whose states it reads": "gemma4_assistant gemma4_unified_assistant",
    "hashed attention without a KV cache": "reformer",
    "pictures or sound": "fuyu git mllama musicgen musicgen_melody phi4_multimodal",
}


def registered() -> list[str]:
    """Every family with a causal language model, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def left_out(family: str) -> str:
    """Why a family is not tried; "" where it is."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for reason, families in _LEFT_OUT.items():
        if family in families.split():
            return reason
    if "ConditionalGeneration" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]:
        return "pictures or sound"
    if "text_config" in CONFIG_MAPPING[family].sub_configs:
        return "a composite: its text decoder is a family of its own"
    return ""
