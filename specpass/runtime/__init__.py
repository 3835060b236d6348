"""Generate from an exported folder with numpy and ONNX Runtime; nothing here needs torch or transformers."""

from specpass.runtime.session import Runtime, State, load

__all__ = ["Runtime", "State", "load"]
