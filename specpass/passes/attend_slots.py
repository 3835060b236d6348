"""attend_slots: in decode, every site's attention goes over the slots that the lengths say are in use.

before: sdpa(q, view(keys), view(values), mask)
after:  attend(q, keys, values, lengths, scale)                 the mask's subgraph dies

Where KV heads have budgets of their own, append_kv has their offsets, and the storage is read as it lies:

before: sdpa(q, show_heads(keys, offsets), show_heads(values, offsets), mask)
after:  attend(q, keys, values, lengths, scale, 0.0, None, 0, 0, None, offsets, layers)

Where the prompt is quantised, append_kv has it besides, and

after:  attend(q, keys, values, lengths, scale, 0.0, None, 0, 0, None, None, 1, [codes, counts, basis], bits)

Where several sequences share the prompt, append_kv has its slots besides, and

after:  attend_cascade(q, keys, values, lengths, [prompt_keys, prompt_values, counts], scale)

A bias of the keys (ALiBi) goes into an operand, by where the slots' tokens stood: key_bias(slopes, slot_positions(
positions, keys), ...) [B, H, P].
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import AppendKv, Widen
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, ancestors, behind, skip_full_slices
from specpass.passes.annotate import key_of, value_of
from specpass.passes.attend_packed import key_bias
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.base import STEPS
from specpass.rewrite.sites import Alibi, Site, Sites

NO_CHANGES = (0.0, None, 0, 0, None)  # of attention: soft cap, sinks, window, chunk, bias
UNSPREAD = (
    "attention reads what is made of cached keys, or adds a bias by their positions (ALiBi), and its KV heads cannot "
    "share budgets: use spread='uniform'"
)


@dataclasses.dataclass(frozen=True)
class AttendSlots(Pass):
    name: ClassVar[str] = "attend_slots"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = STEPS
    requires: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        rewritten, appends = [], AppendKv.find(gm.graph)
        owns: dict[fx.Node, fx.Node] = {}
        for site in facts[Sites].sites:
            append = AppendKv.of(site.cache)
            if append.offsets is not None:
                layers = sum(each.keys is append.keys for each in appends)
                rewritten.append(attend_ragged(editor, site, append, layers))
                continue
            own = (append.keys, append.values)
            wides = [view for view in Widen.find(gm.graph) if view.node < site.attention and view.storage in own]
            owns |= {wide.node: own_slots(editor, wide, site) for wide in wides}
            keys, values = (owns.get(node, node) for node in (site.key, site.value))
            if site.alibi is not None:
                site = dataclasses.replace(site, bias=slot_bias(editor, site, site.alibi, keys))
            operands = (site.query, keys, values, append.lengths, site.scale, *site.options)
            if append.prompt is not None:
                changes = (*site.options, *NO_CHANGES[len(site.options) : 4])
                layers = sum(each.prompt[0] is append.prompt[0] for each in appends if each.prompt is not None)
                operands = (*operands[:4], append.prompt, site.scale, *changes, layers)
            elif append.quantized is not None:
                changes = (*site.options, *NO_CHANGES[len(site.options) :])
                operands = (*operands[:5], *changes, None, 1, append.quantized, append.bits)
            operator = SPEC.attend if append.prompt is None else SPEC.attend_cascade
            new = editor.call(operator, *operands, before=site.attention, like=site.attention)
            editor.replace(site.attention, new)
            rewritten.append(dataclasses.replace(site, key=keys, value=values, attention=new))
        for append in appends:
            if append.quantized is not None or append.prompt is not None:  # they have been read
                append.update(quantized=None, bits=0, prompt=None)
        facts.add(Sites(tuple(rewritten)))
        gm.graph.eliminate_dead_code()


def attend_ragged(editor: Editor, site: Site, append: AppendKv, layers: int) -> Site:
    """The site over a storage [B, T, D] of so many layers, where KV heads have budgets of their own.

    Raises: Refusal: attention reads what is made of the slots, as if all heads had as many.
    """
    if site.alibi is not None or tuple(map(skip_full_slices, site.cached)) != (key_of(append), value_of(append)):
        raise Refusal(UNSPREAD, site.module)
    changes = (*site.options, *NO_CHANGES[len(site.options) :], append.offsets, layers)
    operands = (site.query, append.keys, append.values, append.lengths, site.scale, *changes)
    new = editor.call(SPEC.attend, *operands, before=site.attention, like=site.attention)
    editor.replace(site.attention, new)
    return dataclasses.replace(site, key=append.keys, value=append.values, attention=new)


def slot_bias(editor: Editor, site: Site, alibi: Alibi, keys: fx.Node) -> fx.Node:
    """[B or 1, H, P]; a draft's slots hold its whole prompt, so that they are the positions."""
    place = {"before": site.attention, "like": site.attention}
    if alibi.positions is None:
        return key_bias(editor, alibi, editor.call(SPEC.key_columns, keys, **place), site.attention)
    AppendKv.of(site.cache).update(positions=None)  # they have been read
    slots = editor.call(SPEC.slot_positions, alibi.positions, keys, **place)
    return key_bias(editor, alibi, slots, site.attention)


def own_slots(editor: Editor, wide: Widen, site: Site) -> fx.Node:
    """Let the site read the layer's own slots [B, K, P, D] where the model was shown those of the widest layer."""
    made = behind(wide.node) & set(ancestors(site.attention))
    place = {"before": wide.node.next, "like": site.attention}
    own = editor.call(ATEN.unflatten.int, wide.storage, 1, [wide.kv_heads, -1], **place)
    editor.replace(wide.node, own)
    for node in sorted(made - {site.attention}):
        editor.refresh(node)
    return own
