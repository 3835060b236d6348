"""One decode step for ONNX: caches in, caches out."""

from __future__ import annotations

from torch import Tensor, fx

from specpass.export.flatten import Inliner, flatten
from specpass.export.forms import by_head
from specpass.export.name_nodes import named
from specpass.export.program import Program, names
from specpass.graph.edit import fake_mode_of
from specpass.graph.walk import value


def decode_program(gm: fx.GraphModule, kv: list[tuple[int, int, int]], weights: dict[str, Tensor]) -> Program:
    """step(ids [B, 1], position [B, 1], lengths [layers, B, K], storages [B, K, P, D], weights) -> logits, storages."""
    gm = named(gm, "decode")
    layers = len(kv)
    inputs = gm.graph.find_nodes(op="placeholder")
    ids, position = map(value, inputs[:2])
    places = inputs[2 : 2 + 3 * layers]
    stores = [place for index, place in enumerate(places) if index % 3 < 2]
    with fake_mode_of(gm):
        storages = [by_head(value(place), kv[index // 2][0]) for index, place in enumerate(stores)]
        lengths = ids.new_zeros(layers, ids.shape[0], max(heads for heads, _, _ in kv))

    def run(ids: Tensor, position: Tensor, lengths: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        storages, params = rest[: 2 * layers], rest[2 * layers :]
        inner = Inliner(gm)
        inner.stores = dict(zip(stores, storages, strict=True))
        args = []
        for layer in range(layers):
            args += [states.flatten(1, 2) for states in storages[2 * layer : 2 * layer + 2]]
            args.append(lengths[layer, :, : kv[layer][0]])
        logits = inner.run(ids, position, *args, *params)
        logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        return (logits, *(inner.stores[store] for store in stores))

    flat = flatten(gm, run, [ids, position, lengths, *storages, *map(value, inputs[2 + 3 * layers :])], "decode")
    return Program(
        flat,
        ("input_ids", "position_ids", "lengths", *names("past", layers)),
        ("logits", *names("present", layers)),
        weights,
    )
