"""The part of a tensor parallel model that one process computes, as plain tensors and functional collectives.

transformers spreads weights as DTensors and puts forwards of its own around the modules that its plan names, which
convert from and to DTensors: no graph of plain operators can be traced through these. What they compute on one rank
without gradients is the module on its own part of the weights, with at most one collective behind it. A twin of the
model says just that: modules of the same classes over the same memory, whose collectives are functional ones
(torch.ops._c10d_functional), which stay in the graph. The model itself, its weights and its forwards are left alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from specpass.errors import ParallelPlanError

Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def sum_over(parts: Tensor, group: str) -> Tensor:
    """The sum of the ranks' tensors, which are alike in shape."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(parts.contiguous(), "sum", group))


def join_last(part: Tensor, width: int, size: int, group: str) -> Tensor:
    """[..., width] of the ranks' parts of the last dimension; the last rank's may be shorter, as DTensor cuts."""
    ops = torch.ops._c10d_functional
    whole = -(-width // size)
    last_first = nn.functional.pad(part, (0, whole - part.shape[-1])).movedim(-1, 0).contiguous()
    joined = ops.wait_tensor(ops.all_gather_into_tensor(last_first, size, group))
    return joined[:width].movedim(0, -1).contiguous()


class Collective:
    """What a twin's module does besides what its class says; its repr says all of it."""


@dataclasses.dataclass(frozen=True)
class Sum(Collective):
    """Behind a module whose output is its rank's summand. A bias is added once, behind the sum."""

    group: str

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        total = sum_over(output, self.group)
        bias = module._parameters.get("bias_of_sum")
        return total if bias is None else total + bias


@dataclasses.dataclass(frozen=True)
class Join(Collective):
    """Behind a module whose output is its rank's part of the last dimension."""

    group: str
    size: int
    width: int

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return join_last(output, self.width, self.size, self.group)


@dataclasses.dataclass(frozen=True)
class OwnPart(Collective):
    """In front of a module that reads its rank's part of the last dimension, where every rank has all of it."""

    rank: int
    size: int

    def __call__(self, module: nn.Module, args: Any) -> Tensor:
        width = -(-args[0].shape[-1] // self.size)
        return args[0][..., width * self.rank : width * (self.rank + 1)]


@dataclasses.dataclass(frozen=True)
class EmbedPart(Collective):
    """A forward for an embedding that holds the vocabulary from the id `first` on: ids of other ranks are nothing.

    Args: own: the module's own forward.
    """

    own: Callable[[Tensor], Tensor] = dataclasses.field(repr=False)
    first: int
    rows: int
    group: str

    def __call__(self, ids: Tensor) -> Tensor:
        mine = (ids >= self.first) & (ids < self.first + self.rows)
        found = self.own(torch.where(mine, ids - self.first, 0))
        return sum_over(found.masked_fill(~mine[..., None], 0), self.group)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that a model's weights are spread over.

    Args:
        name: of their group, as functional collectives take it. size: how many. rank: which one this is.
        apart: each of them holds KV heads of its own; else all of them hold all heads, as of OLMo 2 or Phi 3, whose
            plans join what the projections of attention give.
    """

    group: Any
    name: str
    size: int
    rank: int
    apart: bool = True


def choosing(ranks: Ranks | None) -> Ranks | None:
    """The processes whose heads choose together; None where each process chooses for all heads."""
    return None if ranks is None or not ranks.apart else ranks


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that `model` is spread over by a tensor parallel plan; None where it is one's alone.

    Raises: ParallelPlanError: it is spread in another way, too.
    """
    if not any(is_spread(weight) for weight in model.parameters()):
        return None
    how: Any = getattr(model.config, "distributed_config", None)
    if how is None or how.tp_size < 2:
        raise ParallelPlanError(
            "the model's weights are DTensors, and no tensor parallel plan of transformers says what they are parts "
            'of: load it with from_pretrained(..., tp_plan="auto").'
        )
    others = [f"{name}={size}" for name in ("pp_size", "ep_size", "dp_size") if (size := getattr(how, name, 1)) > 1]
    if others:
        raise ParallelPlanError(
            f"the model is spread with {' and '.join(others)}, and specpass prunes what a tensor parallel plan alone "
            f"spreads: load it with DistributedConfig(tp_plan='auto', tp_size={dist.get_world_size()})."
        )
    group = model._mesh_manager.get_mesh("tp").get_group()
    return Ranks(group, group.group_name, dist.get_world_size(group), dist.get_rank(group), heads_apart(plan_of(model)))


def plan_of(model: Any) -> dict[str, str]:
    """The style of each module that a tensor parallel plan names, by its path."""
    found: dict[str, str] = model._resolve_parallel_plans(model.config.distributed_config)[0]
    return found


def heads_apart(plan: dict[str, str]) -> bool:
    """Whether a projection of attention leaves its output in parts, so that each process goes on with its own heads."""
    from torch.distributed.tensor import Shard
    from transformers.distributed import tensor_parallel as styles

    for path, name in plan.items():
        style: Any = styles.ALL_PARALLEL_STYLES[name] if "attn" in path or "attention" in path else None
        parts = isinstance(style, styles.ColwiseParallel) and isinstance(style.output_layouts, Shard)
        if parts or isinstance(style, styles.PackedColwiseParallel):
            return True
    return False


def is_spread(weight: Any) -> bool:
    """Whether a tensor is a part of one that lies in several processes."""
    if not (dist.is_available() and dist.is_initialized()):  # the import below takes its time
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def local_part(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The twin of a tensor parallel `model` that computes its part on this rank, over the same memory.

    Its forward returns what the model's does, on every rank.

    Raises: ParallelPlanError: heads that do not divide, or a style of the plan that has no such form.
    """
    if ranks.apart:
        check_heads(model.config, ranks.size)
    memo: dict[int, Any] = {}
    for module in model.modules():  # what a copy shares with the model
        shared = [held for name, held in vars(module).items() if name in SHARED]
        memo.update((id(held), held) for held in (*shared, *module._buffers.values()) if held is not None)
    for weight in model.parameters():
        local = weight.detach().to_local() if is_spread(weight) else weight
        memo[id(weight)] = nn.Parameter(local, requires_grad=False) if local is not weight else weight
    twin = copy.deepcopy(model, memo)
    for name in MESHES:
        twin.__dict__.pop(name, None)
    modules = dict(twin.named_modules())
    for module in modules.values():
        module.__dict__.pop("forward", None)
    whole = dict(model.named_parameters())
    for path, style in plan_of(model).items():
        if path in modules:
            behind(modules[path], path, style, whole, ranks)
    return twin


MESHES = ("_device_mesh", "_mesh_manager")  # which say where weights lie: a twin's lie in its own process
SHARED = ("config", "generation_config", *MESHES)


def behind(module: nn.Module, path: str, name: str, whole: dict[str, Any], ranks: Ranks) -> None:
    """Put behind a twin's module the collective that its style asks for.

    Raises: ParallelPlanError: the style has no such form.
    """
    from torch.distributed.tensor import Replicate
    from transformers.distributed import tensor_parallel as styles

    style: Any = styles.ALL_PARALLEL_STYLES[name]
    kind = type(style)
    if kind is styles.ColwiseParallel and isinstance(style.input_layouts, Replicate):
        if isinstance(style.output_layouts, Replicate):
            module.register_forward_hook(Join(ranks.name, ranks.size, module.out_features))
    elif kind is styles.RowwiseParallel:
        if isinstance(style.input_layouts, Replicate):
            module.register_forward_pre_hook(OwnPart(ranks.rank, ranks.size))
        module.register_parameter("bias_of_sum", module._parameters.get("bias"))
        module._parameters["bias"] = None
        module.register_forward_hook(Sum(ranks.name))
    elif kind is styles.EmbeddingParallel and style.shard_dim == 1:
        module.register_forward_hook(Join(ranks.name, ranks.size, module.embedding_dim))
    elif kind is styles.EmbeddingParallel and isinstance(module, nn.Embedding):
        rows = -(-whole[f"{path}.weight"].shape[0] // ranks.size)
        module.padding_idx = None  # which says something of gradients alone, and lies beyond a part's end
        module.forward = EmbedPart(module.forward, rows * ranks.rank, module.weight.shape[0], ranks.name)
    elif kind in (styles.AllReduceParallel, styles.MoeExpertsParallel):
        module.register_forward_hook(Sum(ranks.name))
    elif kind not in (
        styles.PackedColwiseParallel,
        styles.ReplicatedWithGradAllReduce,
        styles.MlaKvAProjParallel,
        styles.LocalParamsParallel,
        styles.TensorParallelLayer,
    ):
        raise ParallelPlanError(
            f"{path} is spread as {name!r}, of which specpass knows no form in a graph: leave it out of the plan "
            "(DistributedConfig(tp_plan={...})), or take a model that one device holds."
        )


def check_heads(config: Any, size: int) -> None:
    """Raises: ParallelPlanError: KV heads do not divide among the ranks."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size:
        raise ParallelPlanError(
            f"{heads} KV heads cannot be spread evenly over {size} processes, and each prunes heads of its own: start "
            f"a number that divides {heads}."
        )
