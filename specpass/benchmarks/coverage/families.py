"""The families that transformers registers for causal language models, and which of them are no text decoders."""

from __future__ import annotations

# Encoders that can be told to mask like a decoder: nobody gives them long prompts, and positions end at 512.
_ENCODERS = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
_HALVES = frozenset(
    [
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "trocr",
        "whisper",
    ]
)
# Decoders of sound or pictures, or of text that reads another model's states.
_OTHERS = {
    "blt": "bytes in patches, encoded by a model of their own",
    "fuyu": "pictures",
    "git": "pictures",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "mllama": "pictures, in layers of cross attention",
    "musicgen": "sound",
    "musicgen_melody": "sound",
    "phi4_multimodal": "pictures and sound",
    "reformer": "hashed attention without a KV cache",
}


def registered() -> list[str]:
    """Every family with a causal language model, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def left_out(family: str) -> str:
    """Why a family is not tried; "" where it is."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if family in _ENCODERS:
        return "an encoder"
    if family in _OTHERS:
        return _OTHERS[family]
    if "ConditionalGeneration" in NAMES[family]:
        return "pictures or sound"
    if family in _HALVES:
        return "half of an encoder-decoder"
    if "text_config" in CONFIG_MAPPING[family].sub_configs:
        return "a composite: its text decoder is a family of its own"
    return ""
