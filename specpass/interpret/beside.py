"""What comes with a prompt beside its tokens: pixels, say, whose features the model puts in their placeholders' place.

Models encode them in code that depends on values (grids, tiles), so such a prompt has no graph; its text decoder is
pruned like any other's. Where the tokens stand (mrope: one position for each of several axes) is the model's to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from specpass.cache.prompt import positions_of

# What a call says of its tokens and of what is to be returned; all else is beside.
_CALL = (
    "input_ids inputs_embeds attention_mask position_ids past_key_values labels use_cache return_dict logits_to_keep "
    "output_attentions output_hidden_states"
)
CALL = frozenset(_CALL.split())
ENCODED = "mm_encoder_outputs"  # of generate, which encodes images in front of its loop: one model's, no other's


def features(call: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments that hold numbers which are no text: pixel_values, input_features, ..."""
    return tuple(name for name, given in call.items() if name not in CALL and holds_numbers(given))


def holds_numbers(given: Any) -> bool:
    """Whether there is a tensor of floats in it."""
    if isinstance(given, Tensor):
        return given.is_floating_point()
    if isinstance(given, Mapping):
        return any(holds_numbers(item) for item in given.values())
    return isinstance(given, (list, tuple)) and any(holds_numbers(item) for item in given)


def beside(call: Mapping[str, Any], draft: nn.Module, target: nn.Module) -> dict[str, Any]:
    """Arguments beside the tokens that a draft reads a prompt with, positions included; none unless it takes them all.

    Args: target: whose call it is.
    """
    names = set(inspect.signature(draft.forward).parameters) - ({ENCODED} if draft is not target else set())
    if not features(call) or not names.issuperset(features(call)):
        return {}
    return {name: call[name] for name in names & call.keys() if name == "position_ids" or name not in CALL}


def positions_for(model: nn.Module, ids: Tensor, mask: Tensor | None, call: Mapping[str, Any]) -> Tensor:
    """Position ids of the tokens so far: the call's, else those that generate() gives. [1 or B, S], or [P, B, S].

    Raises: Exception: what the model itself raises, of grids that do not fit the placeholders.
    """
    if call.get("position_ids") is not None:
        return call["position_ids"]
    prepare = getattr(model, "_prepare_position_ids_for_generation", None)
    if prepare is None:
        return positions_of(ids.new_ones(ids.shape) if mask is None else mask)
    known = {name: given for name, given in call.items() if name not in CALL or name == "past_key_values"}
    return prepare(ids, {**known, "attention_mask": mask})


def types_mask(model: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether token types say which tokens see each other both ways: of an image, or of a whole prefix (PaliGemma)."""
    several = getattr(model, "input_modalities", "text") not in ("text", ("text",), ["text"])
    return several and call.get("token_type_ids") is not None


def leave_out_kinds(call: dict[str, Any]) -> None:
    """Kinds of tokens, all of them text, say nothing, and cost a graph. Those of a step are not looked at."""
    kinds = call.get("mm_token_type_ids")
    if isinstance(kinds, Tensor) and (kinds.shape[1] == 1 or not bool(kinds.any())):
        del call["mm_token_type_ids"]


def axes_disagree(positions: Any) -> bool:
    """Whether position ids of several axes [P, B, q] say more than one axis would: of text they do not."""
    several = isinstance(positions, Tensor) and positions.dim() == 3
    return several and not bool((positions == positions[:1]).all())
