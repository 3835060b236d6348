"""The exact model for ONNX: every KV pair is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specpass.capture.draft import capture_draft
from specpass.export.decode import decode_program
from specpass.export.flatten import Inliner, flatten
from specpass.export.forms import by_head
from specpass.export.name_nodes import named
from specpass.export.program import Capture, Program, names
from specpass.graph.edit import fake_mode_of
from specpass.graph.operands import results_of
from specpass.graph.walk import value
from specpass.ops import rows


class Exact:
    """The exact model: every KV pair is kept. The draft's capture, which prunes nothing, is taken for the target."""

    def __init__(self, target: nn.Module) -> None:
        self.target = target

    def capture(self) -> Capture:
        graphs = capture_draft(self.target)
        weights = {f"target.{name}": tensor for name, tensor in graphs.params.items()}
        layers = graphs.layers
        prefill = named(graphs.prefill, "prefill")
        inputs = prefill.graph.find_nodes(op="placeholder")
        results = results_of(prefill.graph)
        ids, count = value(inputs[0]), len(inputs) - len(weights)
        heads = [value(results[3 + 3 * index]).shape[1] for index in range(layers)]

        def run(ids: Tensor, mask: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
            order, lengths = rows.pack_order(mask, ids)
            out = Inliner(prefill).run(rows.pack_ids(ids, order), lengths, 0, *params)
            states = [by_head(out[1 + 3 * layer + part], heads[layer]) for layer in range(layers) for part in (0, 1)]
            column = torch.arange(ids.shape[1])
            row = torch.where(column < lengths[:, None], column, -1)[:, None]
            return (out[0], *states, *(row.expand(-1, heads[layer], -1).clone() for layer in range(layers)))

        with fake_mode_of(prefill):
            mask = ids.new_ones(ids.shape)
        flat = flatten(prefill, run, [ids, mask, *map(value, inputs[count:])], "prefill")
        widths = [int(value(node).shape[2]) if index % 3 else 0 for index, node in enumerate(results)]
        kv = [(heads[layer], widths[1 + 3 * layer], widths[2 + 3 * layer]) for layer in range(layers)]
        outputs = ("logits", *names("present", layers), *(f"positions.{layer}" for layer in range(layers)))
        first = Program(flat, ("input_ids", "attention_mask"), outputs, weights)
        return Capture(first, decode_program(graphs.step, kv, weights), kv)
