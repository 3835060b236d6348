"""eight_bits: a draft's steps read copies of its weights in int8; its prefill, and what else it is, stay."""

from __future__ import annotations

import torch
from tiny import prompt, tiny

import specpass
from specpass.capture.draft import capture_draft
from specpass.dialect.linear import LinearRows8
from specpass.graph.aten import Linear
from specpass.kernels.cpu.linear8 import quantized
from specpass.lowering.eight_bits import eight_bits
from specpass.passes.draft import DraftGraphs

METHOD = specpass.SpecKV(budget=40, window=4, lookahead=4)


def graphs_of() -> DraftGraphs:
    return capture_draft(tiny(seed=1, intermediate_size=128).to(torch.bfloat16), METHOD, goes_on=True)


def test_steps_read_rounded_weights_and_the_prefill_those_that_were() -> None:
    plain, found = graphs_of(), graphs_of()
    assert plain.plain_step is plain.step
    count = len(plain.params)
    size = eight_bits([found.step, found.extend], [found.prefill], found.params)
    added = list(found.params)[count:]
    assert size == sum(found.params[name].nbytes for name in added) > 0
    linears = [len(Linear.find(gm.graph)) for gm in (plain.step, found.step, plain.prefill, found.prefill)]
    assert linears[1] == 0  # every layer's, and the head's
    assert linears[2] == linears[3] > 0
    assert sum(len(call.weights) for call in LinearRows8.find(found.step.graph)) == linears[0]

    rounded = dict(plain.params)
    for name in added[::2]:
        numbers, scale = quantized(plain.params[name.removesuffix(".int8")])
        rounded[name.removesuffix(".int8")] = (numbers * scale[:, None]).bfloat16()
    ids, lengths = prompt(12, seed=2), torch.tensor([12])
    logits, *caches = found.prefill(ids, lengths, 4, *found.params.values())
    due, *theirs = plain.prefill(ids, lengths, 4, *plain.params.values())
    assert torch.equal(logits, due)
    for turn, (ours, wanted) in enumerate(((found.step, plain.step), (found.extend, plain.extend))):
        width = 1 + turn
        given = prompt(width, seed=3), 12 + turn + torch.arange(width)[None]
        logits = ours(*given, *caches, *found.params.values())
        # The embedding is the head's weight too, and is read as it is: only the layers' weights are given rounded.
        due = wanted(*given, *theirs, *[rounded[n] if "embed" not in n else plain.params[n] for n in plain.params])
        assert float((logits - due).abs().max()) < 0.05 * float(due.float().std())
