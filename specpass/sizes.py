"""What is read from a model's config: EOS ids, context, and sizes (some from a model of it on the meta device)."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

_LAYER = re.compile(r"\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Sizes of a dense decoder; `mlp_matrices` is 3 for gated MLPs, 2 for plain ones, `itemsize` in bytes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int | None = None) -> Decoder | None:
        """Sizes from a Hugging Face config; None where the layers are not those of a dense decoder.

        That is where there are experts, and where a layer has a window, chunks or a state.

        Args: itemsize: bytes a number; None takes the config's dtype.
        """
        text = config.get_text_config(decoder=True)
        if not all(hasattr(text, name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")):
            return None
        if any(span != FULL for span in layer_spans(text)):
            return None
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        inner = next(
            (getattr(text, name) for name in ("intermediate_size", "ffn_dim", "n_inner") if getattr(text, name, None)),
            4 * text.hidden_size,
        )
        attention = text.hidden_size * head_dim * 2 * (heads + kv_heads)
        weights = layer_weights(config)
        if weights is None:
            return None
        per_layer = weights / text.num_hidden_layers
        matrices = (per_layer - attention) / (text.hidden_size * inner)
        if matrices not in (2, 3):
            return None
        return cls(
            text.num_hidden_layers,
            text.hidden_size,
            heads,
            kv_heads,
            head_dim,
            inner,
            text.vocab_size,
            int(matrices),
            itemsize or _itemsize(config),
        )


@dataclasses.dataclass(frozen=True)
class Span:
    """What a query of a layer reads of what is in front of it: everything, unless one of these is not 0.

    Args:
        sliding: the last so many positions, its own included.
        chunk: those of its own chunk of so many positions.
    """

    sliding: int = 0
    chunk: int = 0

    @property
    def positions(self) -> int:
        """The most that a query reads; 0 where nothing bounds it."""
        return self.sliding or self.chunk

    def reads(self, row: Any, column: Any) -> Any:
        """Whether a query at position `row` reads position `column`: numbers, or tensors that broadcast."""
        causal = column <= row
        if self.chunk:
            return causal & (row // self.chunk == column // self.chunk)
        return causal & (row - column < self.sliding) if self.sliding else causal

    def __str__(self) -> str:
        if self.chunk:
            return f"attention in chunks of {self.chunk}"
        return f"sliding window {self.sliding}" if self.sliding else "full attention"


FULL = Span()


def layer_spans(config: Any) -> tuple[Span | None, ...]:
    """What the config says of each decoder layer's attention; None for a layer of another kind (it recurs, say)."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, bounds = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    fields = {"full_attention": "", "sliding_attention": "sliding", "chunked_attention": "chunk"}
    spans: list[Span | None] = []
    for kind, bound in zip(kinds, bounds, strict=True):
        field = fields.get(kind)
        spans.append(None if field is None else FULL if not field else Span(**{field: int(bound["sliding_window"])}))
    return tuple(spans)


def eos_ids(config: Any) -> tuple[int, ...]:
    """Ids that end a sequence, by a model's config or generation config: it names none, one or several."""
    ids = config.eos_token_id
    if ids is None:
        return ()
    return tuple(map(int, ids)) if isinstance(ids, (list, tuple)) else (int(ids),)


def pad_id(config: Any) -> int:
    """The id that stands behind a sequence's end: the padding's, else the first that ends one, else 0."""
    ends = eos_ids(config)
    return int(config.pad_token_id) if config.pad_token_id is not None else (ends[0] if ends else 0)


def context_length(config: Any) -> int | None:
    """Positions that a model was made for, or None if its config does not say."""
    text = config.get_text_config()
    made_for, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if made_for and rope.get("rope_type") == "dynamic":  # the base grows with what is beyond
        return int(made_for * rope.get("factor", 1.0))
    return made_for


def layer_weights(config: Any) -> int | None:
    """Numbers in the matrices of all decoder layers; None for a config that transformers makes no model of."""
    text = config.get_text_config(decoder=True)
    kind: Any = type(text)
    return _layer_weights(kind, text.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=16)
def _layer_weights(kind: Any, text: str) -> int | None:
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_MAPPING:
        return None
    maker = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel  # a VLM's decoder is no LM
    with torch.device("meta"):
        model = maker.from_config(kind.from_dict(json.loads(text)))
    return sum(
        p.numel() for name, p in model.named_parameters() if p.dim() > 1 and _LAYER.search(name) and "embed" not in name
    )


def _itemsize(config: Any) -> int:
    import torch

    dtype = getattr(config, "dtype", None) or torch.float32
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
