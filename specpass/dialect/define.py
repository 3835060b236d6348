"""The namespace of specpass's operators."""

from __future__ import annotations

import torch

SPEC = torch.ops.specpass
