"""Real models by name, hub id, folder or GGUF file: fetched once, converted once, cached."""

from specpass.hub.resolve import (
    any_config,
    at_revision,
    is_cached,
    load,
    load_tokenizer,
    model_path,
    prepare,
    read_config,
)
from specpass.hub.sources import MODELS, ModelSource
from specpass.hub.weights import check_weights

__all__ = [
    "MODELS",
    "ModelSource",
    "any_config",
    "at_revision",
    "check_weights",
    "is_cached",
    "load",
    "load_tokenizer",
    "model_path",
    "prepare",
    "read_config",
]
