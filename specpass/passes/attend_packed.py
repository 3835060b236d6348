"""attend_packed: every site's attention becomes causal attention over packed rows, without a mask.

before: sdpa(q, k, v, mask [B, 1, S, S] or causal, ...)
after:  prefill_attention(q, k, v, scale)                   a row never sees what follows it, padding stands behind

A bias of the keys (ALiBi) goes from the mask into an operand: key_bias(slopes, key_columns(k), ...) [1, H, T].
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import PROMPTS
from specpass.rewrite.sites import Alibi, Sites


@dataclasses.dataclass(frozen=True)
class AttendPacked(Pass):
    name: ClassVar[str] = "attend_packed"
    stage: ClassVar[str] = "TRACED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS
    requires: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        rewritten = []
        for site in facts[Sites].sites:
            place = {"before": site.attention, "like": site.attention}
            if site.alibi is not None:
                columns = editor.call(SPEC.key_columns, site.key, **place)
                site = dataclasses.replace(site, bias=key_bias(editor, site.alibi, columns, site.attention))
            tensors = (site.query, site.key, site.value, site.scale)
            new = editor.call(SPEC.prefill_attention, *tensors, *site.options, **place)
            editor.replace(site.attention, new)
            rewritten.append(dataclasses.replace(site, attention=new))
        facts.add(Sites(tuple(rewritten)))
        gm.graph.eliminate_dead_code()  # the masks


def key_bias(editor: Editor, alibi: Alibi, positions: fx.Node, before: fx.Node) -> fx.Node:
    """[B or 1, H, T] at positions [B or 1, K or 1, T]."""
    slopes = editor.beside(alibi.slopes, positions, before)
    return editor.call(SPEC.key_bias, slopes, positions, alibi.dtype, alibi.factor, before=before, like=before)
