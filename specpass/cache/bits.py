"""Whether a cache can hold prompts in so many bits."""

from __future__ import annotations

from typing import Any

from specpass.bits import BITS
from specpass.errors import CacheBitsError
from specpass.methods.base import Method

SHARED = "each prompt gets a budget of its own, for which its slots are moved once more"


def check_bits(bits: Any, method: Method) -> int:
    """Bits of a quantised prompt; 0 for None.

    Raises: CacheBitsError: no such bits, or KV heads do not all have a budget that is known before.
    """
    if bits is None:
        return 0
    if isinstance(bits, bool) or bits not in BITS:
        raise CacheBitsError(
            f"cache_bits={bits!r}: expected one of {', '.join(map(str, BITS))}; None leaves the cache in the model's "
            "dtype."
        )
    if method.spread != "uniform":
        raise CacheBitsError(
            f"cache_bits={bits} and {method.name}(spread={method.spread!r}), whose KV heads have budgets of their own: "
            "use spread='uniform', or leave cache_bits out."
        )
    if method.share is not None:
        raise CacheBitsError(
            f"cache_bits={bits} and {method.name}(budget={method.budget!r}, share={method.share}): {SHARED}. Give a "
            "number of KV slots, e.g. budget=1024, without share, or leave cache_bits out."
        )
    return int(bits)
