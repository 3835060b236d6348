"""The second phase: the lookahead goes through the target as an append of which nothing stays.

Recurrent layers go on from copies of their states, keys and values of the lookahead are held until their queries have
scored, and then each layer is compacted. The logits are those of the first phase: the target has not seen a lookahead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specpass.cache.states import StateLayer
from specpass.interpret.prompt import ReadPrompt, Waiting
from specpass.interpret.rows import behind
from specpass.interpret.watch import Attention, Listener, Watch

INITIAL = ("initial_state", "initial_states")


class ReadAhead(Listener):
    """L tokens behind a prompt whose layers wait; they come in one call, or one by one."""

    watch: Watch

    def __init__(self, prompt: ReadPrompt, length: int) -> None:
        self.prompt = prompt
        self.cache, self.keeper, self.length = prompt.cache, prompt.keeper, length
        self.waiting = prompt.waiting
        self.whole: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of exact layers: what they read, and drop
        self.watch = Watch(self)
        self.new: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        waiting = self.waiting.get(layer)
        if waiting is None:
            own = self.cache.layers[layer]
            parts = self.whole.setdefault(layer, [(own.keys, own.values)])
            parts.append((key, value))
            return self._joined(parts)
        self.new[layer] = (key, value)
        held = [(keys, values) for _, keys, values in waiting.ahead]
        keys, values = self._joined([waiting.raw, *held, (key, value)])
        self.watch.follow(layer, keys, values)
        return keys, values

    @staticmethod
    def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        out = call.run()
        if layer not in self.new or made != self.cache.layers[layer].made:  # another layer reads them, or none does
            return out
        key, value = self.new.pop(layer)
        waiting = self.waiting[layer]
        waiting.ahead.append((call.unfolded(key.shape[2]).query, key, value))
        if sum(query.shape[2] for query, _, _ in waiting.ahead) == self.length:
            self._compact(layer, self.waiting.pop(layer), call)
        return out

    def settle(self) -> None:
        """After the last token: a layer whose attention did not read the lookahead stays whole."""
        for layer, waiting in self.waiting.items():
            self.prompt.keep_whole(layer, *waiting.raw, "its attention did not read the lookahead")
        self.waiting.clear()

    def _compact(self, layer: int, waiting: Waiting, call: Attention) -> None:
        keeper, own = self.keeper.on(waiting.key.device), self.cache.layers[layer]
        lengths = keeper.packing.lengths
        if waiting.window is None:
            keeper.compact(own, waiting.key, waiting.value, None)
            return
        query, key, value = (torch.cat(parts, 2) for parts in zip(*waiting.ahead, strict=True))
        packed = behind(waiting.key, key, lengths), behind(waiting.value, value, lengths)
        read = (self._packed(call.key), self._packed(call.value)) if own.made else packed
        scores = keeper.score(torch.cat([waiting.window, query], 2), *read, waiting.scale)
        reduce = keeper.method.reduce
        keeper.compact(own, *packed, scores if waiting.apart else keeper.one_choice(scores, key.shape[1], reduce))

    def _packed(self, states: Tensor) -> Tensor:
        """[B, H, S + L, D] in the model's columns, each row's tokens and then its lookahead first."""
        packing, size = self.keeper.packing.on(states.device), states.shape[2] - self.length
        return behind(packing.states(states[:, :, :size]), states[:, :, size:], packing.lengths)


def borrow_attributes(model: nn.Module) -> Callable[[], None]:
    """Let states that a model keeps in its modules (RecurrentGemma) go on from copies; the result puts them back."""
    before = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)  # parameters and buffers are kept elsewhere
    ]
    for module, name, value in before:
        setattr(module, name, value.clone())

    def put_back() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return put_back


def reads_initial_states(model: nn.Module, layers: list[Any]) -> bool:
    """Whether several tokens behind a state may come in one call.

    Convolutions go on from their state in any case. A recurrence does where the model's code has a scan that takes
    initial states (gated delta rule, Mamba 2); Mamba 1's has none and starts from zero, so its tokens come one by one.
    """
    if not any(isinstance(layer, StateLayer) and layer.has_recurrence for layer in layers):
        return True
    homes = {type(module).__module__ for module in model.modules()}
    functions = [found for home in homes for found in vars(sys.modules[home]).values() if inspect.isfunction(found)]
    return any(name in INITIAL for function in functions for name in inspect.signature(function).parameters)
