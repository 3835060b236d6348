"""What a graph may hold and must hold at a stage, and the check of it.

Which of specpass's operators may stand in a graph is said where they are declared (`since`, `until`); what a graph must
hold of them, one for each attention site, is in STAGES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from specpass.dialect import attention, cache, cascade, sparse
from specpass.dialect.define import NAMESPACE, OPERATORS, ORDER, Operator, operator_name
from specpass.graph.walk import module_path
from specpass.rewrite.base import Kind
from specpass.rewrite.verify import StageError

Choice = tuple[type[Operator], ...]  # one of these


@dataclasses.dataclass(frozen=True)
class Stage:
    """`must[kind]`: a graph of that kind has one call of an operator of each choice, for each attention site; of those
    that store keys and values, for each site with a cache of its own."""

    name: str
    must: Mapping[Kind, tuple[Choice, ...]]

    def may_hold(self, operator: type[Operator], left: bool) -> bool:
        """Whether the operator may stand in a graph of this stage; `left`: and in one that is done with it."""
        at = ORDER.index(self.name)
        return ORDER.index(operator.since) <= at and not (left and ORDER.index(operator.until) < at)


def _stage(name: str, prompts: tuple[Choice, ...], steps: tuple[Choice, ...]) -> Stage:
    return Stage(name, {"prefill": prompts, "short": prompts, "decode": steps, "append": steps})


_PREFILLS, _STORES = (cache.Fill, cache.KeepKv), (cache.GatherKv, cache.GatherRagged, cache.KeepKv)
_STORING = {operator.name for operator in (cache.Fill, *_STORES, cache.AppendKv)}
_BOTH = (attention.AppendAttend, attention.AppendAttendLse)
_ATTENDS = (attention.Attend, cascade.AttendCascade)
_FLASH = (attention.PrefillAttention, attention.PrefillAttentionLse, sparse.PrefillAttentionSparse)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        _stage("TRACED", (_PREFILLS,), ((cache.AppendKv,),)),
        _stage("DRAFTED", (_PREFILLS, _FLASH), ((cache.AppendKv,),)),
        _stage("PRUNED", (_STORES, _FLASH), ((cache.AppendKv,), _ATTENDS)),
        _stage("LOWERED", (_STORES, _FLASH), ((cache.AppendKv, *_BOTH), (*_ATTENDS, *_BOTH))),
    )
}


def check_stage(
    gm: fx.GraphModule, stage: Stage, when: str, *, left: bool, kind: Kind, sites: int | None, owners: int | None = None
) -> None:
    """The graph holds nothing that it may not hold; where it has `left` the stage, also all that it must.

    Args:
        when: "after take_last", for the message.
        sites: attention sites, None where nobody has counted them: then there is one at least.
        owners: those with a cache of their own, None: all of them.

    Raises: StageError.
    """
    calls: dict[str, list[fx.Node]] = {}  # of specpass's operators, by name
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == NAMESPACE:
            calls.setdefault(operator_name(node), []).append(node)
    for name, nodes in calls.items():
        operator, found = OPERATORS[name], nodes[0]
        if not stage.may_hold(operator, left):
            raise StageError(
                f"{when}: {found.name} ({module_path(found) or 'no module'}) is not allowed in a {stage.name} "
                f"graph: {name} belongs to {operator.since} .. {operator.until}"
            )
    if not left:
        return
    for choice in stage.must[kind]:
        count = sum(len(calls.get(operator.name, ())) for operator in choice)
        due = owners if owners is not None and _STORING & {operator.name for operator in choice} else sites
        if count != due if due is not None else count == 0:
            names = " or ".join(operator.name for operator in choice)
            raise StageError(
                f"{when}: a {stage.name} {kind} graph has one {names} for each of its "
                f"{'' if due is None else f'{due} '}attention sites, and this one has {count}"
            )
