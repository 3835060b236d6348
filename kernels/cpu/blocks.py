"""The large results of one layer lie where the last layer's lay, while a prompt is read on a CPU.

The largest values of a piece of rows (lowering/row_pieces.py), or of a whole prompt where a layer has no such pieces,
lie above the size from which malloc maps memory for one allocation and unmaps it when it is freed: every layer has the
system zero the same pages anew, a tenth of a prefill's time. While `reused()` holds, generated code takes memory for
the largest size that it has asked for from blocks that stay, of which the last reference goes when the prefill ends, or
when a larger size is asked for. What outlives the call holds no more than itself. Idle blocks are bounded, and lie
beside what attention holds meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specpass.kernels.readers import readers

LARGE = 32 << 20  # bytes: the most that malloc ever keeps in its heap
IDLE = 320 << 20  # bytes that stay while something else is needed
_allocate = torch._C._dynamo.guards._empty_strided_cpu
_view = torch._C._dynamo.guards._reinterpret_tensor


class _Blocks(threading.local):
    held: list[Tensor] | None = None


_blocks = _Blocks()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """`empty_strided` of this thread hands out large blocks again that nobody reads any more."""
    before, _blocks.held = _blocks.held, []
    try:
        yield
    finally:
        _blocks.held = before


def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty_strided on a CPU, of a dense tensor."""
    held, count = _blocks.held, math.prod(size)
    wanted = count * dtype.itemsize
    if held is None or wanted <= LARGE:
        return _allocate(size, stride, dtype)
    largest = max((block.nbytes for block in held), default=0)
    idle = [block for block in held if readers(block) == 1]
    if wanted < largest:
        gone = {id(block) for block in idle[IDLE // largest :]}
        held[:] = [block for block in held if id(block) not in gone]
        return _allocate(size, stride, dtype)
    if wanted > largest:
        held.clear()  # those in use live on with their readers
        idle.clear()
    block = next((block for block in idle if block.dtype == dtype), None)
    if block is None:
        block = _allocate((count,), (1,), dtype)
        held.append(block)
    return _view(block, size, stride, 0)
