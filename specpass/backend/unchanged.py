"""What a kept graph was made for: a call's form, and a model that is still what its key said."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.overrides import _len_torch_function_stack
from transformers.cache_utils import DummyLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specpass.cache.budget import BudgetCache
from specpass.cache.protocol import BudgetLayer
from specpass.capture.stored import HOOKS, PLAIN, Undescribed, code_of
from specpass.methods.base import Method
from specpass.sizes import Span

# Of a cache and its layers: counted or noted by what runs around a graph, read by no trace. The config is the model's.
UNREAD = {
    "appended",
    "asked",
    "assisted",
    "awaited",
    "behind",
    "budgeted",
    "cache",
    "config",
    "handle",
    "held",
    "kept",
    "layers",
    "made_with",
    "max_new_tokens",
    "pruned_by",
    "read_mask",
    "readers",
    "rotation",
    "served",
    "uneven",
}
TENSORS = ("_parameters", "_buffers", "_modules", *HOOKS)
# What models call besides their own module's functions.
SHARED = tuple(
    f"transformers.{name}"
    for name in ("activations", "cache_utils", "masking_utils", "modeling_rope_utils", "integrations.sdpa_attention")
)


def form_of(cache: BudgetCache, kwargs: Mapping[str, Any]) -> Hashable:
    """All that a trace of this call may look at, but for sizes and the model.

    Raises: Undescribed: it cannot be told (objects with a state, a mode that looks at every operator).
    """
    if _len_torch_function_stack() or _len_torch_dispatch_stack() or torch.compiler.is_compiling():
        raise Undescribed
    if torch._dynamo.config.disable or torch._dynamo.eval_frame._stance.stance != "default":
        raise Undescribed
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        *(torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)),
    )
    given = tuple((name, _held(value)) for name, value in sorted(kwargs.items()) if name != "past_key_values")
    return modes, given, _attributes(cache), tuple(_layer(layer) for layer in cache.layers)


def _layer(layer: Any) -> Hashable:
    if type(layer) is DummyLayer:
        return "none"
    if type(layer) is not BudgetLayer:
        raise Undescribed
    return _attributes(layer)


def _attributes(holder: Any) -> Hashable:
    return tuple((name, _held(value)) for name, value in vars(holder).items() if name not in UNREAD)


def _held(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter):
            raise Undescribed
        return value.dtype, str(value.device), value.dim(), value.requires_grad
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_held, value))
    if isinstance(value, (Method, Span)):
        return repr(value)
    raise Undescribed


def registered(attention: str) -> list[str]:
    """The functions that transformers has for this attention and its masks, as they are now."""
    found = [registry.get(attention) for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return [code_of(function) for function in found if function is not None]


@dataclasses.dataclass
class Watch:
    """Whether a model, its classes and their modules hold what they held; looked at before each call.

    By identity: dicts compare what they hold so first. Their sizes and dtypes are checked as a graph's inputs.
    """

    pairs: list[tuple[Mapping[str, Any], dict[str, Any]]]
    functions: list[Any]
    kinds: list[type[nn.Module]]

    @classmethod
    def of(cls, model: nn.Module) -> Watch:
        kinds = list({type(module) for module in model.modules()})
        dicts = [held for module in model.modules() for held in (vars(module), *(vars(module)[n] for n in TENSORS))]
        names = {kind.__module__ for kind in kinds} | set(SHARED)
        dicts += [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]
        configs: list[Any] = [model.config, model.config.get_text_config(decoder=True)]
        for config in configs:
            dicts += [vars(config), *(held for held in vars(config).values() if isinstance(held, dict))]
        return cls([(live, dict(live)) for live in dicts], _functions(kinds), kinds)

    def same(self) -> bool:
        try:
            return all(live == copy for live, copy in self.pairs) and _functions(self.kinds) == self.functions
        except (RuntimeError, ValueError):  # other tensors and arrays have no truth value
            return False


def _functions(kinds: list[type[nn.Module]]) -> list[Any]:
    return [kind.forward for kind in kinds] + [
        registry.get("sdpa") for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    ]
