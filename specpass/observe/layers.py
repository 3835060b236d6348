"""Decoder layers as a model's own forward goes through them, for who watches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from specpass.observe import progress


@contextlib.contextmanager
def reading_by_layers(model: Any, what: str = progress.READING) -> Iterator[None]:
    """The first forward inside is a task whose parts are the layers; those behind it (an answer's tokens) are none."""
    layers = decoder_layers(model) if progress.watched() else []
    if not layers:
        yield
        return
    task = contextlib.ExitStack()
    hooks = contextlib.ExitStack()

    def begin(*_: Any) -> None:
        task.enter_context(progress.task(what, len(layers)))

    def done(layer: nn.Module, *_: Any) -> None:
        progress.advance()
        if layer is layers[-1]:
            hooks.close()
            task.close()

    hooks.callback(layers[0].register_forward_pre_hook(begin).remove)
    for layer in layers:
        hooks.callback(layer.register_forward_hook(done).remove)
    with task, hooks:
        yield


def decoder_layers(model: Any) -> list[nn.Module]:
    """The modules of a Hugging Face decoder's layers, in order; none where its list of them is not found."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    inside = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = (module for module in (inside or model).modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])
