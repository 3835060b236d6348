"""Lower bounds of a measurement: arithmetic over the machine's matmul rate, bytes over its bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specpass.benchmarks import methods
from specpass.benchmarks.models import Pair

if TYPE_CHECKING:
    from specpass.sizes import Decoder


def floors(
    pair: Pair, method: str, budget: int | None, length: int, batch: int, found: dict[str, Any], rates: dict[str, float]
) -> dict[str, float | None]:
    """ttft_floor_s and decode_floor_ms.

    Args: found: the measurement, with weight_bytes (a peer's are the target's) and kv_bytes. rates: of machine_rates.
    """
    flops = prefill_flops(pair, method, budget, length, batch)
    weights = found.get("weight_bytes") or target_weights(pair)
    return {
        "ttft_floor_s": None if flops is None else flops / rates["flops_per_s"],
        "decode_floor_ms": 1000 * (weights + found["kv_bytes"]) / rates["bytes_per_s"],
    }


def prefill_flops(pair: Pair, method: str, budget: int | None, length: int, batch: int) -> float | None:
    """FLOPs before the first token, the causal half of attention alone; None for models that are not dense decoders.

    The draft's prefill and its L - 1 steps are counted where a method drafts; scores and selection are not.
    """
    from specpass import hub
    from specpass.sizes import Decoder

    configs = (hub.read_config(name, trust_remote_code=pair.trust) for name in (pair.target_name, pair.draft_name))
    target, draft = map(Decoder.of, configs)
    if target is None or draft is None:
        return None
    if budget is None or length <= budget or not method.startswith(methods.PREFIX):
        return _pass(target, length, length, batch)
    made = methods.make(method, budget)
    read = length if made.prompt is None else min(length, int(made.prompt.budget))
    drafted = made.look_ahead()
    total = _pass(target, read + (drafted if made.appends else 0), read, batch)
    if drafted:
        total += _pass(draft, length, length, batch) + (drafted - 1) * _pass(draft, 1, 2 * length, batch)
    return total


def _pass(decoder: Decoder, rows: int, columns: int, batch: int) -> float:
    """`rows` new tokens against half of `columns` keys on average; one row of logits."""
    d = decoder
    layer = 2 * d.hidden * d.heads * d.head_dim + 2 * d.hidden * d.kv_heads * d.head_dim
    layer += d.mlp_matrices * d.hidden * d.intermediate
    attention = 2 * rows * columns * d.heads * d.head_dim
    return batch * (d.layers * (2 * rows * layer + attention) + 2 * d.hidden * d.vocab)


def target_weights(pair: Pair) -> int:
    """Bytes of the weights that a decode step reads: an untied input embedding is one row, left out."""
    from specpass import hub
    from specpass.sizes import Decoder, layer_weights

    config = hub.read_config(pair.target_name, trust_remote_code=pair.trust)
    decoder = Decoder.of(config)
    size = decoder.itemsize if decoder else 2
    return size * (layer_weights(config) + config.vocab_size * config.hidden_size)
