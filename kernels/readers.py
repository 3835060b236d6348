"""Who reads a tensor's storage: what is kept for a later call may be handed out again when nobody does."""

from __future__ import annotations

import torch
from torch import Tensor


def readers(tensor: Tensor) -> int:
    """Tensors that share this one's storage, itself included."""
    storage = tensor.untyped_storage()  # one more while it is looked at
    return torch._C._storage_Use_Count(storage._cdata) - 1
