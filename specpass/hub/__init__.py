"""Real models by name, hub id or folder: fetched once, converted once, cached."""

from specpass.hub.resolve import is_cached, load, model_path, prepare, read_config
from specpass.hub.sources import MODELS, ModelSource
from specpass.hub.weights import check_weights

__all__ = ["MODELS", "ModelSource", "check_weights", "is_cached", "load", "model_path", "prepare", "read_config"]
