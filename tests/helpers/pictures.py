"""Tiny random vision-language models, and prompts with images in them (no network, no processor)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from tiny import PAD, SPREAD, VOCAB
from torch import Tensor

IMAGE, VIDEO, START, END = 120, 121, 122, 123  # placeholder ids
_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": SPREAD,
    **_IDS,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
_GRID: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "in_channels": 3, "initializer_range": SPREAD}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "initializer_range": SPREAD,
}

# family -> (transformers prefix, config arguments)
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**_TEXT, **_MROPE},
            "vision_config": {**_GRID, "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
            | {"out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**_TEXT, **_MROPE, "head_dim": 16},
            "vision_config": {**_GRID, "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
            | {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**_SIGLIP, "image_size": 16, "vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
    ),
    "smolvlm": (
        "SmolVLM",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_SIGLIP, "image_size": 16},
            "scale_factor": 2,
        },
    ),
    "paligemma": (  # lets the whole prompt see itself
        "PaliGemma",
        {
            "text_config": {"model_type": "gemma", **_TEXT, "head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "image_size": 8, "num_image_tokens": 4}
            | {"projection_dim": 64},
            "projection_dim": 64,
        },
    ),
}
_QWEN = ("qwen2_5_vl", "qwen3_vl")


def vlm(family: str, *, seed: int = 0, layers: int = 2) -> Any:
    """A random model of one family: a text decoder of so many layers, a vision tower of 1 or 2."""
    prefix, settings = PICTURES[family]
    text = {**settings["text_config"], "num_hidden_layers": layers}
    text |= {"layer_types": text["layer_types"][-layers:]} if "layer_types" in text else {}
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_token_index": IMAGE}
    names |= {"vision_start_token_id": START, "vision_end_token_id": END}
    config = getattr(transformers, f"{prefix}Config")(
        **{**settings, "text_config": text}, **names, tie_word_embeddings=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).float().eval()
        for parameter in model.requires_grad_(False).parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    for field, value in _IDS.items():
        setattr(model.generation_config, field, value)
    return model


@dataclasses.dataclass(frozen=True)
class Seen:
    """A prompt's ids [B, S] and the arguments that go with them."""

    ids: Tensor
    beside: dict[str, Any]


def with_pictures(family: str, texts: list[Tensor], *, seed: int = 0, images: int = 1) -> Seen:
    """Prompts of random text [1, n], each with `images` pictures in it, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((1, 4), IMAGE)
    piece = torch.cat([torch.tensor([[START]]), tokens, torch.tensor([[END]])], 1)
    rows = [torch.cat([text[:, :3], *[piece] * images, text[:, 3:]], 1) for text in texts]
    size = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), size), 9), torch.zeros(len(rows), size, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, size - row.shape[1] :] = row[0]
        mask[index, size - row.shape[1] :] = 1
    kinds = (ids == IMAGE).long()
    beside: dict[str, Any] = {"attention_mask": mask}
    count = images * len(rows)
    if family in _QWEN:
        beside["pixel_values"] = torch.randn(count * 16, 3 * 2 * 16, generator=generator)
        beside["image_grid_thw"] = torch.tensor([[1, 4, 4]] * count)
        beside["mm_token_type_ids"] = kinds
    else:
        size = 8 if family == "paligemma" else 16
        beside["pixel_values"] = torch.randn(count, 3, size, size, generator=generator)
        if family == "smolvlm":
            beside["pixel_values"] = beside["pixel_values"].reshape(len(rows), images, 3, 16, 16)
        else:
            beside["token_type_ids"] = torch.zeros_like(kinds) if family == "paligemma" else kinds
    return Seen(ids, beside)
