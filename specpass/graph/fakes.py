"""The mode that fake values of symbolic sizes belong to."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def symbolic_mode() -> FakeTensorMode:
    """A fake mode with a shape environment of its own, and without torch's cache of what operators give.

    The cache does not pay where sizes are symbols: to keep a result it is made a second time, and one that is found is
    no cheaper than one that is computed. A tenth of the time that compiling takes went there.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode
