"""Layers of a BudgetCache that recur: their states are kept exactly, beside a pruned attention or alone.

transformers' own layers hold the states; what they lack of a cache's protocol is added here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import DummyLayer, LinearAttentionLayer, get_layer_types_and_kwargs

from specpass.cache.protocol import BudgetLayer
from specpass.cache.rows import repeat_rows
from specpass.cache.widest import tell_widest
from specpass.sizes import FULL, Span, layer_spans

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache

STATES = ("conv", "linear_attention")  # a state and no keys
BOTH = ("hybrid", "hybrid_sliding")  # a state beside attention
NEITHER = ("dummy",)  # experts or an MLP alone, or another layer's keys
RECURRENT = (*STATES, *BOTH)
KEYS = ("full_attention", "sliding_attention", "chunked_attention")  # keys and values alone


def layer_types(config: Any) -> list[str]:
    """Kind of each decoder layer, in transformers' words."""
    return list(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])


def recurrent_layer(config: Any) -> str:
    """The first layer that has a state, in words; "" where none has."""
    for index, kind in enumerate(layer_types(config)):
        if kind in RECURRENT:
            return f"layer {index} is configured as {kind}"
    return ""


def why_unheld(config: Any) -> str:
    """Why a BudgetCache is of no use to a model; "" where it is."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config(decoder=True)), None)
    usual = getattr(model, "_supports_default_dynamic_cache", None)  # as generate() asks
    if usual is not None and not usual():
        return f"{model.__name__} has a cache of its own kind"
    kinds = layer_types(config)
    for index, kind in enumerate(kinds):
        if kind not in (*KEYS, *RECURRENT, *NEITHER):
            return f"layer {index} is configured as {kind}, whose cache is of another form"
    return "" if set(kinds) & {*KEYS, *BOTH} else "no layer of the model holds keys and values, so nothing grows"


class StateLayer(LinearAttentionLayer):
    """A convolution's or a recurrence's states: after the prompt and each token, never after a lookahead."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def has_recurrence(self) -> bool:
        """Whether there is more than a convolution's last columns."""
        return any(self.is_recurrent_states_initialized.values())

    def state_tensors(self) -> list[Tensor]:
        """All states that are filled."""
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in states if state is not None]

    def map_states(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each state t by change(t)."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)

    def borrow_states(self) -> Callable[[], None]:
        """Go on with copies of the states; the function returned puts the originals back."""
        names = ("conv_states", "recurrent_states", "has_previous_state")
        before = {name: getattr(self, name) for name in names}
        for name, held in before.items():
            copies = {key: item.clone() if isinstance(item, Tensor) else item for key, item in held.items()}
            setattr(self, name, copies)
        return lambda: self.__dict__.update(before)

    def drop_recorded(self, tokens: int) -> None:
        """Take the last `tokens` tokens out of recorded convolution states, and what is no longer needed."""
        LinearAttentionLayer.crop(self, -tokens)

    def reset(self) -> None:
        """Forget the states; the next prompt may have another batch."""
        StateLayer.__init__(self, self.number_of_states)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_states(lambda state: repeat_rows(state, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_states(lambda state: state[indices.to(state.device)])


class StateBudgetLayer(StateLayer, BudgetLayer):
    """Both: a state, and full attention that is pruned (Falcon-H1, Zamba2)."""

    def __init__(self, cache: BudgetCache, index: int, budget: int, span: Span, states: int = 1) -> None:
        StateLayer.__init__(self, states)
        BudgetLayer.__init__(self, cache, index, budget, span)

    def reset(self) -> None:
        if hasattr(self, "number_of_states"):
            StateLayer.reset(self)
        BudgetLayer.reset(self)

    def offload(self) -> None:
        StateLayer.offload(self)
        BudgetLayer.offload(self)

    def take_rows(self, rows: Tensor, prompts: Tensor | None = None) -> None:
        StateLayer.reorder_cache(self, rows)
        BudgetLayer.take_rows(self, rows, prompts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        BudgetLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        StateLayer.batch_repeat_interleave(self, repeats)
        BudgetLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        BudgetLayer.batch_select_indices(self, indices)


def make_layers(cache: BudgetCache, config: Any) -> list[Any]:
    """A cache layer for each layer of the model.

    The method's budgets go to those that read the whole prompt; a window's slots are what it can read.
    """
    kinds, options = get_layer_types_and_kwargs(config)
    grows = [kind in ("full_attention", "hybrid") for kind in kinds]
    budgets = iter(cache.method.layer_budgets(sum(grows)))
    layers: list[Any] = []
    for index, (kind, own, span) in enumerate(zip(kinds, options, layer_spans(config), strict=True)):
        if kind in STATES:
            layers.append(StateLayer(**own))
        elif kind in NEITHER:
            layers.append(DummyLayer())
        else:
            budget = next(budgets) if grows[index] else own["sliding_window"]
            if kind in BOTH:
                layers.append(StateBudgetLayer(cache, index, budget, span_beside(own), own["number_of_states"]))
            else:
                layers.append(BudgetLayer(cache, index, budget, span))
    tell_widest([layer for layer in layers if isinstance(layer, BudgetLayer)])
    tell_sharers(cache, layers)
    return layers


def tell_sharers(cache: BudgetCache, layers: list[Any]) -> None:
    """Tell layers whose heads lie in one storage, where those of all layers share: all that grow with the prompt.

    One prompt may leave out some of them, which had to stay whole.
    """
    if cache.method.spread != "global":
        return
    sharers = [layer for layer in layers if isinstance(layer, BudgetLayer) and layer.ragged]
    for layer in sharers:
        layer.sharers = sharers


def span_beside(options: dict[str, Any]) -> Span:
    """What attention reads in a layer that has a state as well."""
    return Span(sliding=int(options["sliding_window"])) if "sliding_window" in options else FULL
