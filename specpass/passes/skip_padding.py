"""skip_padding: masked tokens among those that a step appends are read by nobody and take no slot.

before: append_kv(keys, values, lengths, k, v); o = attend(q, keys, values, lengths, ...)
after:  order, place, padding = pack_appended(mask, ids)                once: row b's real tokens first
        append_kv(keys, values, lengths, take_rows(k, order), take_rows(v, order))
        o = take_rows(attend(take_rows(q, order), ...), place)          in the caller's order again
        take_back(lengths, padding)                                     the next token overwrites the padding

A graph is told of a mask where one of the appended tokens is masked; what the mask says of earlier ones, lengths say. A
single token with a mask as wide as the slots is not masked: models with ALiBi are given one to make their bias of.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import AppendKv
from specpass.dialect.cascade import attend_of
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import first_call, value
from specpass.passes.facts import Inputs
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.base import STEPS
from specpass.rewrite.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class SkipPadding(Pass):
    name: ClassVar[str] = "skip_padding"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = STEPS
    requires: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        inputs = facts.get(Inputs)
        if inputs is None or inputs.mask is None:
            return
        if inputs.mask.users:  # the masks that attention read are gone
            raise Refusal(f"attention_mask is read outside attention (by {next(iter(inputs.mask.users)).target})")
        width, biased = value(inputs.mask).shape[1], any(site.bias is not None for site in facts[Sites].sites)
        if biased and request.kind == "decode" and not (isinstance(width, int) and width == 1):
            return
        editor, first = Editor(gm), first_call(gm.graph)
        tokens = inputs.embeds if inputs.ids is None else inputs.ids
        packed = editor.call(SPEC.pack_appended, inputs.mask, tokens, before=first)
        order, place, padding = (editor.item(packed, index, first) for index in range(3))
        sites = tuple(skip(editor, site, order, place) for site in facts[Sites].sites)
        for last in {site.cache: site for site in sites}.values():  # behind all who read the cache
            answer = next(iter(last.attention.users))
            lengths, behind = AppendKv.of(last.cache).lengths, answer.next
            masked = editor.beside(padding, lengths, behind)
            editor.call(SPEC.take_back, lengths, masked, before=behind, like=last.attention)
        facts.add(Sites(sites))


def skip(editor: Editor, site: Site, order: fx.Node, place: fx.Node) -> Site:
    """Pack what a site appends and asks by `order`, unpack what it answers by `place`."""
    append, attend = AppendKv.of(site.cache), attend_of(site.attention)
    first = append.node if append.node < attend.node else attend.node
    order, place = (editor.beside(node, site.query, first) for node in (order, place))
    if not site.reads:
        key, value = (
            editor.call(SPEC.take_rows, node, order, before=append.node, like=append.node)
            for node in (append.key, append.value)
        )
        append.update(key=key, value=value)
    query = editor.call(SPEC.take_rows, attend.query, order, before=attend.node, like=attend.node)
    attend.update(query=query)
    behind = attend.node.next
    answer = editor.call(SPEC.take_rows, attend.node, place, before=behind, like=attend.node)
    attend.node.replace_all_uses_with(answer, delete_user_cb=lambda user: user is not answer)
    return dataclasses.replace(site, query=query)
