"""One of two processes that share models: runs every case, and leaves what became of each as JSON.

Started by test_tensor_parallel.py: `python ranks.py RANK FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import compile_eager, padded, second_way
from tiny import EAGER, prompt, tiny
from transformers.distributed import DistributedConfig
from two_ranks import run_cases

import specpass
from specpass import errors
from specpass.interpret import keep

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"vocab": 127},  # which does not divide
    "qwen3": {},
    "gemma2": {},
    "mistral": {"tie_word_embeddings": True},
}
METHODS = {
    "speckv": specpass.SpecKV(budget=24, window=8, lookahead=4),
    "snapkv": specpass.SnapKV(budget=24, window=8),
    "pyramidkv": specpass.PyramidKV(budget=24, window=8),
    "streamingllm": specpass.StreamingLLM(budget=24),
    "specpc": specpass.SpecPC(budget=24, window=8),
    "speckvpc": specpass.SpecKVPC(budget=16, window=4, lookahead=4, prompt_budget=32, prompt_window=8),
}
SPECKV = METHODS["speckv"]
HEADS = dataclasses.replace(SPECKV, spread="heads")


def spread(family: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """(a model of one process, the same one spread over both)."""
    whole = tiny(family, **{"layers": 1, **settings})
    path = folder / "-".join([family, *map(str, settings.values())])
    if dist.get_rank() == 0:
        whole.save_pretrained(path)
    dist.barrier()
    how = "eager" if family in EAGER else "sdpa"
    plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return whole, type(whole).from_pretrained(
        path, distributed_config=plan, attn_implementation=how, dtype=torch.float32
    ).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return padded([prompt(60), prompt(47, seed=1)])


def answer(model: Any, method: Any, draft: Any, lowering: str = "eager") -> tuple[torch.Tensor, Any]:
    ids, mask = batch()
    specpass.compile(model, draft=draft if method.needs_draft else None, method=method, lowering=lowering)
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=5)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert not specpass.report(model).interpreted, specpass.report(model).interpreted
    specpass.restore(model)
    return out, cache


def same(whole: Any, parts: Any, method: Any, draft: Any, lowering: str = "eager", spread_draft: Any = None) -> Any:
    """Tokens are one process's, and so are the positions that this rank's heads keep.

    Args: spread_draft: the draft as both processes have it, where they share it too.
    """
    tokens, positions = on_rank_0(lambda: told(*answer(whole, method, draft)))
    mine, own = told(*answer(parts, method, spread_draft or draft, lowering))
    assert mine == tokens
    check_heads(own, positions)
    return mine, own


def check_heads(own: list[Any], every: list[Any]) -> None:
    """This rank's positions are its heads' part of one process's."""
    assert len(own) == len(every)
    for part, all_heads in zip(own, every, strict=True):
        heads = len(part[0])
        first = heads * dist.get_rank()
        assert part == [row[first : first + heads] for row in all_heads]
        assert heads * dist.get_world_size() == len(all_heads[0])


def told(tokens: torch.Tensor, cache: Any) -> tuple[Any, Any]:
    """Tokens, and each layer's positions, as lists."""
    return tokens.tolist(), kept(cache)


def kept(cache: Any) -> list[Any]:
    """Of each layer, row and KV head the positions in use."""
    layers = [layer.positions.tolist() for layer in cache.layers]
    return [[[[at for at in head if at >= 0] for head in row] for row in layer] for layer in layers]


def on_rank_0(act: Callable[[], Any]) -> Any:
    """What rank 0 finds, on both: one process's answers are computed once."""
    found = [act() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return found[0]


def turns(model: Any, draft: Any) -> list[int]:
    """Three turns behind one pruned prompt."""
    compile_eager(model, SPECKV, draft)
    return asked(model, specpass.BudgetCache(model.config, SPECKV, max_new_tokens=24))


def turns_that_hold(model: Any) -> list[int]:
    """The same, each of which chooses among all of the conversation."""
    second_way(model, METHODS["snapkv"])
    return asked(model, specpass.BudgetCache(model.config, METHODS["snapkv"], max_new_tokens=24, dropped="host"))


def asked(model: Any, cache: Any) -> list[int]:
    ids = prompt(60)
    for turn in range(3):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        ids = torch.cat([ids, prompt(7, seed=turn)], 1)
    specpass.restore(model)
    return ids[0].tolist()


def behind_a_document(model: Any, method: Any) -> tuple[Any, Any]:
    compile_eager(model, method)
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=5)
    prefix, question = specpass.read(model, prompt(50)[0]), prompt(20, seed=1)
    out = model.generate(question, prefix=prefix, past_key_values=cache, max_new_tokens=5, do_sample=False)
    specpass.restore(model)
    return told(out, cache)


def raises(error: type[Exception], *texts: str) -> Callable[[Callable[[], Any]], None]:
    def check(act: Callable[[], Any]) -> None:
        with pytest.raises(error) as raised:
            act()
        assert all(text in str(raised.value) for text in texts), str(raised.value)

    return check


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    whole, parts = spread("llama", folder)
    draft, rank = tiny("llama", layers=1, seed=7), dist.get_rank()

    def inductor() -> None:
        """Written down for the processes that come after these."""
        found = same(whole, parts, HEADS, draft, "inductor")
        (folder / f"inductor{rank}.json").write_text(json.dumps(found))

    yield "inductor", inductor

    def three_turns() -> None:
        assert turns(parts, draft) == on_rank_0(lambda: turns(whole, draft))
        assert turns_that_hold(parts) == on_rank_0(lambda: turns_that_hold(whole))

    yield "three turns", three_turns

    def left_alone() -> None:
        """The model is as before, behind an answer of one process."""
        before = dict(parts.named_parameters())
        forwards = {name: module.__dict__.get("forward") for name, module in parts.named_modules()}
        same(whole, parts, METHODS["snapkv"], None)
        assert all(weight is before[name] for name, weight in parts.named_parameters())
        assert all(module.__dict__.get("forward") is forwards[name] for name, module in parts.named_modules())

    yield "llama-snapkv", left_alone
    disagree, budget = errors.RanksDisagreeError, 24 + 8 * rank
    other = tiny("llama", layers=1 + rank, seed=7)
    yield (
        "another method",
        lambda: raises(disagree, "method is", "on rank 1", "on rank 0")(
            lambda: compile_eager(parts, specpass.SnapKV(budget=budget, window=8))
        ),
    )
    yield (
        "another draft",
        lambda: raises(disagree, "the draft is", "num_hidden_layers=2", "num_hidden_layers=1")(
            lambda: compile_eager(parts, SPECKV, other)
        ),
    )
    yield (
        "a mistake of one",
        lambda: raises(
            disagree if rank == 0 else errors.MissingDraftError, *(["rank 1", "MissingDraft"] if rank == 0 else [])
        )(lambda: compile_eager(parts, SPECKV, draft if rank == 0 else None)),
    )
    plan = errors.ParallelPlanError
    yield (
        "a draft that scores",
        lambda: raises(plan, "SpecPC", "the draft", "2 processes")(
            lambda: compile_eager(parts, METHODS["specpc"], parts)
        ),
    )
    one_head, no_style = spread("llama", folder, num_key_value_heads=1)[1], spread("smollm", folder)[1]
    yield (
        "heads that do not divide",
        lambda: raises(plan, "1 KV heads", "2 processes")(lambda: compile_eager(one_head, METHODS["snapkv"])),
    )
    no_style._tp_plan = {**no_style._tp_plan, "model.norm": "sequence_parallel"}
    yield (
        "a style without a form",
        lambda: raises(plan, "model.norm", "'sequence_parallel'")(lambda: compile_eager(no_style, METHODS["snapkv"])),
    )

    def plain_door() -> None:
        method = METHODS["snapkv"]
        parts.compile(backend=specpass.Backend(method=method, lowering="eager"), dynamic=True)
        try:
            parts(input_ids=prompt(60), past_key_values=specpass.BudgetCache(parts.config, method))
        finally:
            parts._compiled_call_impl = None

    yield "the plain door", lambda: raises(plan, "specpass.compile")(plain_door)
    yield "llama-speckv", lambda: same(whole, parts, SPECKV, whole, spread_draft=parts)
    for name in ("pyramidkv", "streamingllm", "specpc", "speckvpc"):
        yield f"llama-{name}", lambda method=METHODS[name]: same(whole, parts, method, draft)
    for family, sizes in FAMILIES.items():
        models = spread(family, folder, **sizes)
        yield family, lambda models=models: same(*models, METHODS["snapkv"], None)

    def all_heads() -> None:
        """Attention norms all heads together: every process holds and chooses for all of them."""
        one, parts = spread("olmoe", folder)
        method = dataclasses.replace(METHODS["snapkv"], spread="heads")
        assert told(*answer(parts, method, None)) == on_rank_0(lambda: told(*answer(one, method, None)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keep, "all_of_ranks", None)  # no scores go around
            assert behind_a_document(parts, method) == on_rank_0(lambda: behind_a_document(one, method))

    yield "olmoe", all_heads


def main(rank: int, folder: Path) -> None:
    run_cases(rank, folder, cases)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
