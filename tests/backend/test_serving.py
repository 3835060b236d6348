"""transformers' own ways to serve: its server's generation thread, and continuous batching."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model
from support import compile_eager
from tiny import prompt, tiny
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import GenerateManager

import specpass
from specpass.errors import UnsupportedCallError

METHOD = specpass.SnapKV(budget=24, window=8)
GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
PAGED = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_model(tmp_path_factory.mktemp("models") / "words", layers=1)
    return AutoTokenizer.from_pretrained(folder)


def test_the_servers_thread_runs_a_compiled_model(tokenizer: Any) -> None:
    """`transformers serve` hands requests to this: generate() in a thread of its own, streamed or not."""
    model = compile_eager(tiny("llama", layers=1), METHOD)
    ids = prompt(60)
    expected = model.generate(ids, generation_config=GREEDY)[0, 60:].tolist()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    async def asked() -> tuple[list[int], str, str]:
        manager = GenerateManager()
        text, _, tokens = await manager.generate_non_streaming(model, tokenizer, inputs, GREEDY, "0")
        queue, _ = manager.generate_streaming(model, tokenizer, inputs, GREEDY, "1")
        pieces = []
        while (piece := await asyncio.wait_for(queue.get(), 60)) is not None:
            assert isinstance(piece, str), piece
            pieces.append(piece)
        return tokens.tolist(), text, "".join(pieces)

    tokens, text, streamed = asyncio.run(asked())
    assert tokens == expected
    assert streamed == text
    assert specpass.report(model).refusals == []
    assert [len(graph.sites) for graph in specpass.report(model).graphs] == [1, 1]


def test_continuous_batching_is_refused_until_the_model_is_restored() -> None:
    model = compile_eager(tiny("llama", layers=1), METHOD)
    ids = [prompt(60)[0].tolist()]
    with pytest.raises(UnsupportedCallError, match=r"SnapKV.*generate\(\).*PromptCompressor"):
        model.generate_batch(ids, generation_config=GREEDY, continuous_batching_config=PAGED)
    with pytest.raises(UnsupportedCallError, match="continuous-batching"):
        model.init_continuous_batching()
    specpass.restore(model)
    assert "init_continuous_batching" not in vars(model)


def test_shortened_prompts_go_through_continuous_batching() -> None:
    model, draft = tiny("llama", layers=1), tiny("llama", layers=1, seed=7)
    compressor = specpass.PromptCompressor(
        draft, specpass.SpecPC(budget=24, window=8, kernel=8, neighbours=4), lowering="eager"
    )
    short = [compressor(ids[0].tolist()).ids for ids in (prompt(60), prompt(47, seed=1))]
    assert [len(ids) for ids in short] == [24, 24]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(short, generation_config=config, continuous_batching_config=PAGED, warmup=False)
    one_by_one = [model.generate(torch.tensor([ids]), generation_config=GREEDY)[0, 24:].tolist() for ids in short]
    assert [answer.generated_tokens for answer in answers.values()] == one_by_one
