"""What models do to attention logits before the softmax, as jit functions that every kernel calls.

`emit` splices them into the module of a site, with the branches that the site's constants choose.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # logits are in base 2, as the hardware's exponential is


@triton.jit
def base2_logits(products, scale, SOFTCAP: tl.constexpr):
    """Products of queries and keys: scaled, capped to SOFTCAP * tanh(logits / SOFTCAP) unless it is 0, in base 2."""
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1) holds where the exponential overflows and where it vanishes
        raised = tl.exp2(products * (scale * 2 * LOG2E / SOFTCAP))
        logits = SOFTCAP * LOG2E * (1 - 2 / (raised + 1))
    else:
        logits = products * (scale * LOG2E)
    return logits


@triton.jit
def add_sink(best, total, sinks, head, member, inside, K: tl.constexpr, G: tl.constexpr):
    """A running softmax (its maximum and its sum) with one logit more for each member of head's group.

    sinks [H] float32, natural; head counts B * K; member 0 .. G - 1, read where inside.
    """
    sink = tl.load(sinks + (head % K) * G + member, mask=inside, other=0.0) * LOG2E
    new = tl.maximum(best, sink)
    return new, total * tl.exp2(best - new) + tl.exp2(sink - new)
