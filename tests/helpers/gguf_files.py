"""Tiny GGUF files, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
from tiny import tiny
from transformers.convert_slow_tokenizer import bytes_to_unicode

ENDS = ["<|endoftext|>", "<|im_end|>"]
TOKENS = [*bytes_to_unicode().values(), "th", *ENDS]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"


def write_gguf(
    file: Path,
    layers: int = 2,
    seed: int = 0,
    kind: str = "F32",
    architecture: str = "qwen2",
    parts: int = 1,
    merges: tuple[str, ...] = ("t h",),
) -> Path:
    """A random Qwen2 with a byte-level tokenizer; matrices as `kind`, F32, F16 or Q8_0."""
    model = tiny("qwen2", layers=layers, seed=seed, vocab=len(TOKENS))
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if token in ENDS else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_pad_token_id(len(TOKENS) - 2)
    writer.add_chat_template(TEMPLATE)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(stem)
        stored = gguf.GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
        writer.add_tensor(f"{found}.{suffix}", gguf.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
