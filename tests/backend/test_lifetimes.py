"""What lives as long as what: drafts, backends and compiled graphs die with the models that use them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import call, compile_eager
from tiny import prompt, tiny
from torch.multiprocessing.reductions import StorageWeakRef

import specpass
from specpass.backend import entry
from specpass.backend.entry import entry_point

C = 24
METHOD = specpass.SpecKV(budget=C, window=8, lookahead=4)


@dataclasses.dataclass
class Traces:
    """What is left of a pair: the models, and the draft's weights."""

    target: weakref.ref[Any]
    draft: weakref.ref[Any]
    storage: StorageWeakRef

    def alive(self) -> list[bool]:
        gc.collect()
        return [self.target() is not None, self.draft() is not None, not self.storage.expired()]


def used(door: Callable[[Any, Any], Any]) -> Traces:
    """A target and its draft, compiled by a door, called once and forgotten."""
    target, draft = tiny(layers=1), tiny(seed=1, layers=1)
    model = door(target, draft)
    cache = specpass.BudgetCache(target.config, METHOD, max_new_tokens=6)
    call(model, prompt(60), cache)
    call(model, prompt(1), cache)
    assert cache.layers[0].positions.shape[2] == C
    assert cache.lookahead_ids is not None
    if door is restored:
        specpass.restore(target)
    return Traces(weakref.ref(target), weakref.ref(draft), StorageWeakRef(draft.lm_head.weight.untyped_storage()))


def ours(target: Any, draft: Any) -> Any:
    return compile_eager(target, METHOD, draft)


def restored(target: Any, draft: Any) -> Any:
    return ours(target, draft)


def plain(target: Any, draft: Any) -> Any:
    target.compile(backend=specpass.Backend(draft, METHOD, lowering="eager"), dynamic=True)
    return target


def named(target: Any, draft: Any) -> Any:
    options = {"draft": draft, "method": METHOD, "lowering": "eager"}
    return torch.compile(target, backend=entry_point, dynamic=True, options=options)


@pytest.mark.parametrize("door", [ours, restored])
def test_a_compiled_pair_is_freed(door: Callable[[Any, Any], Any]) -> None:
    for traces in [used(door) for _ in range(2)]:
        assert traces.alive() == [False, False, False]


def test_pairs_leave_no_weight_behind() -> None:
    """Compiled, called, restored (every other one) and deleted, in one process; bench.steady does so with twenty."""
    storages = []
    for number in range(4):
        target, draft = tiny(layers=1, seed=number), tiny(seed=number + 100, layers=1)
        storages += [StorageWeakRef(p.untyped_storage()) for model in (target, draft) for p in model.parameters()]
        compile_eager(target, METHOD, draft)
        cache = specpass.BudgetCache(target.config, METHOD, max_new_tokens=6)
        call(target, prompt(60), cache)
        if number % 2:
            specpass.restore(target)
        del target, draft, cache
    gc.collect()
    assert [storage.expired() for storage in storages] == [True] * len(storages)


def test_restore_frees_the_draft_of_a_model_that_stays() -> None:
    target, draft = tiny(layers=1), tiny(seed=1, layers=1)
    compile_eager(target, METHOD, draft).generate(prompt(60), max_new_tokens=3)
    found = StorageWeakRef(draft.lm_head.weight.untyped_storage())
    specpass.restore(target)
    del draft
    gc.collect()
    assert found.expired()


def test_a_copy_that_is_restored_leaves_the_graphs_to_the_original() -> None:
    target = compile_eager(tiny(layers=1), specpass.StreamingLLM(budget=C))
    target.generate(prompt(60), max_new_tokens=3)
    graphs = len(specpass.report(target).graphs)
    specpass.restore(copy.deepcopy(target))
    target.generate(prompt(60), max_new_tokens=3)
    assert len(specpass.report(target).graphs) == graphs


@pytest.mark.parametrize("door", [plain, named])
def test_torchs_own_doors_free_a_pair_when_dynamo_is_reset(door: Callable[[Any, Any], Any]) -> None:
    """Dynamo holds each backend that torch.compile was given, and with it the draft, until then."""
    traces = used(door)
    torch._dynamo.reset()
    assert traces.alive() == [False, False, False]
    assert not entry._BACKENDS


def namesake(reduce: Any) -> Any:
    """A method class by the name of Own, whose scores are its own."""

    def score(self: Any, query: Any, key: Any, value: Any, rows: Any, lengths: Any, scale: float) -> torch.Tensor:
        return reduce(key.float().abs(), dim=-1)

    fields = {"score": score, "__module__": __name__, "__qualname__": "Own"}
    return dataclasses.dataclass(frozen=True)(type("Own", (specpass.SnapKV,), fields))


def backends(*options: dict[str, Any]) -> int:
    """How many Backends the named door makes of these options while all of them are in use."""
    torch._dynamo.reset()
    target, kept = tiny(layers=1), []
    for chosen in options:
        compiled = torch.compile(target, backend=entry_point, dynamic=True, options={"lowering": "eager", **chosen})
        cache = specpass.BudgetCache(target.config, chosen["method"], max_new_tokens=6)
        call(compiled, prompt(60), cache)
        kept.append(compiled)
    gc.collect()
    return len(entry._BACKENDS)


def test_two_methods_of_one_name_have_a_backend_each() -> None:
    one, other = namesake(torch.sum)(budget=C, window=8), namesake(torch.amax)(budget=C, window=8)
    assert one.key == other.key
    assert backends({"method": one}, {"method": other}) == 2


def test_equal_options_share_a_backend() -> None:
    """Ids as a tensor, ids as lists; a method and its equal."""
    draft, ids = tiny(seed=1, layers=1), [[1, 2, 3, 4]]
    again = dataclasses.replace(METHOD)
    assert backends({"method": METHOD, "draft": draft}, {"method": again, "draft": draft}) == 1
    assert backends({"method": METHOD, "draft": draft}, {"method": METHOD, "draft": tiny(seed=2, layers=1)}) == 2
    given = specpass.SpecKV(budget=C, window=8, lookahead_ids=ids)
    both = ({"method": given, "skip_passes": []}, {"method": given, "skip_passes": ()})
    assert backends(*both) == 1
    first, second = ({"method": given, "lookahead_ids": rows} for rows in (torch.tensor(ids), ids))
    assert entry._key(first) == entry._key(second)
