"""The part of bench/gpu.py that accepts or rejects the product: tokens, on tiny random models in float32."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import specpass
from bench.gpu_models import TINY, make_model
from specpass.backend import uncompiled
from specpass.kernels import dispatch
from specpass.lowering import choose as choosing
from specpass.lowering import fuse_append

if TYPE_CHECKING:
    from bench.gpu import Run

C, W, L = 64, 16, 8
METHODS: dict[str, Any] = {
    "SpecKV": specpass.SpecKV(C, window=W, lookahead=L),
    "SpecKV, global": specpass.SpecKV(C, window=W, lookahead=L, spread="global"),
    "SnapKV, heads": specpass.SnapKV(C, window=W, spread="heads", value_norms=True),
    "SpecPC": specpass.SpecPC(C, window=W, lookahead=L),
    "SpecKV-PC": specpass.SpecKVPC(C, window=W, lookahead=L),
    "SnapKV": specpass.SnapKV(C, window=W),
    "PyramidKV": specpass.PyramidKV(C, window=W),
    "StreamingLLM": specpass.StreamingLLM(C),
}
PROMPT, NEW = 300, 12
GROWS = 70  # tokens: more than a block of slots
INT32 = 2**31  # elements of one tensor, where 32-bit indices end
WIDE = {
    **TINY,
    "hidden_size": 512,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "max_position_embeddings": 65536,
}


def correctness(run: Run) -> None:
    """Each step says whether tokens agree, and which did not."""
    draft = _draft(run)
    answers = Answers(run, draft)
    methods = {name: METHODS[name] for name in (("SpecKV",) if run.tiny else METHODS)}
    with no_second_way():
        for name, method in methods.items():
            run.step("tokens", f"{name}, covering budget", lambda m=method: covering(run, m, draft))
            run.step("tokens", f"{name}, kernels against aten", lambda m=method: against_aten(answers, m))
        for name in sorted(methods.keys() & {"SpecKV", "SpecPC"}):
            method = methods[name]
            run.step("tokens", f"{name}, graphs on and off", lambda m=method: graphs(answers, m))
            run.step("tokens", f"{name}, Inductor against eager", lambda m=method: compiled(answers, m))
        run.step("tokens", "SpecKV, verified lookahead", lambda: followed(run))
        run.step("tokens", "SpecKV, speculation", lambda: speculated(run))
        run.step("tokens", "SpecKV, sparse prefill", lambda: sparse(answers))
        run.step("tokens", "SnapKV, more elements than 32 bits count", lambda: beyond_int32(run))
    torch._dynamo.reset()


@contextlib.contextmanager
def no_second_way() -> Iterator[None]:
    """A graph that cannot be made is an error here; a user's call would go on around the model's own forward."""

    def fail(self: Any, error: Exception, cache: Any) -> None:
        raise error

    before = uncompiled.Uncompiled.failed
    uncompiled.Uncompiled.failed = fail  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        uncompiled.Uncompiled.failed = before  # type: ignore[method-assign]


@contextlib.contextmanager
def aten_alone() -> Iterator[None]:
    """No operator gets a kernel."""

    def none(operator: str, operands: Any) -> dispatch.Choice:
        return dispatch.Choice(operator, None, "aten alone")

    places: list[Any] = [dispatch, choosing, fuse_append]
    before = [place.choose for place in places]
    for place in places:
        place.choose = none
    try:
        yield
    finally:
        for place, own in zip(places, before, strict=True):
            place.choose = own


def _target(run: Run, **sizes: Any) -> Any:
    return make_model(
        {**TINY, "initializer_range": 0.25, "num_hidden_layers": 1 if run.tiny else 3, **sizes},
        run.device,
        torch.float32,
        0,
    )


def _draft(run: Run) -> Any:
    return make_model({**TINY, "initializer_range": 0.25, "num_hidden_layers": 1}, run.device, torch.float32, 1)


def compile_(run: Run, method: Any, draft: Any, **options: Any) -> Any:
    return specpass.compile(_target(run), draft=draft if method.needs_draft else None, method=method, **options)


def calls(run: Run, model: Any, new: int = NEW) -> list[list[int]]:
    """Tokens of two generations in a row, of a padded batch, and of another length; a tiny run's of a padded batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, TINY["vocab_size"], (2, PROMPT), generator=generator).to(run.device)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :50] = 0
    given: list[tuple[Tensor, Tensor]] = [
        (ids, mask),
        (ids.flip(1), mask),
        (ids, padded),
        (ids[:1, 40:], mask[:1, 40:]),
    ]
    tokens = []
    for prompt, seen in given[2:3] if run.tiny else given:
        out = model.generate(
            prompt, attention_mask=seen, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        tokens += out[:, prompt.shape[1] :].tolist()
    return tokens


class Answers:
    """Of each method and its options, called once: tokens, and what the report says of CUDA graphs."""

    def __init__(self, run: Run, draft: Any) -> None:
        self.run, self.draft = run, draft
        self.known: dict[str, tuple[list[list[int]], list[str]]] = {}

    def of(self, method: Any, new: int = NEW, **options: Any) -> tuple[list[list[int]], list[str]]:
        key = f"{method.key} {new} {options}"
        if key not in self.known:
            self.known[key] = self.anew(method, new, **options)
        return self.known[key]

    def anew(self, method: Any, new: int = NEW, **options: Any) -> tuple[list[list[int]], list[str]]:
        model = compile_(self.run, method, self.draft, **options)
        tokens = calls(self.run, model, new)
        notes = [note for note in str(specpass.report(model)).splitlines() if "CUDA graph" in note]
        return tokens, list(dict.fromkeys(notes))


def verdict(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """Rows that agree; the first that does not."""
    wrong = [index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    found: dict[str, Any] = {"right": not wrong, "rows": len(theirs)}
    if wrong:
        found |= {"wrong_rows": wrong, "ours": ours[wrong[0]], "theirs": theirs[wrong[0]]}
    return found


def covering(run: Run, method: Any, draft: Any) -> dict[str, Any]:
    """A budget of at least the prompt: transformers' own tokens."""
    whole = dataclasses.replace(method, budget=2 * PROMPT)
    return verdict(calls(run, compile_(run, whole, draft, lowering="eager")), calls(run, _target(run)))


def against_aten(answers: Answers, method: Any) -> dict[str, Any]:
    ours, _ = answers.of(method, lowering="eager")
    with aten_alone():
        return verdict(ours, answers.anew(method, lowering="eager", cudagraphs=False)[0])


def graphs(answers: Answers, method: Any) -> dict[str, Any]:
    """Answers that outgrow the first storage, too."""
    new = NEW if answers.run.tiny else GROWS
    ours, notes = answers.of(method, new, lowering="eager")
    return verdict(ours, answers.of(method, new, lowering="eager", cudagraphs=False)[0]) | {"notes": notes}


def compiled(answers: Answers, method: Any) -> dict[str, Any]:
    lowering = "eager" if answers.run.tiny else "inductor"  # a tiny run is to be short
    ours, _ = answers.of(method, lowering=lowering)
    return verdict(ours, answers.of(method, lowering="eager", cudagraphs=False)[0])


def followed(run: Run) -> dict[str, Any]:
    """The target's twin drafts: answers follow the lookahead, and are transformers' own while they do."""
    model = compile_(run, METHODS["SpecKV"], _target(run), lowering="eager")
    ours, theirs = (calls(run, each, L + 1) for each in (model, _target(run)))
    free = specpass.report(model).replayed
    found = verdict(ours, theirs)
    return found | {"replayed": free, "right": found["right"] and free == L * len(ours)}


def speculated(run: Run) -> dict[str, Any]:
    """The pruned target's own tokens, several of them verified at a time; graphs of the draft's steps, too."""
    method = METHODS["SpecKV"]
    model = compile_(run, method, _target(run), lowering="eager", speculate=4)
    plain = compile_(run, method, _target(run), lowering="eager", cudagraphs=False)
    new = NEW if run.tiny else GROWS
    found = verdict(calls(run, model, new), calls(run, plain, new))
    report = specpass.report(model)
    counts = {"proposed": report.proposed, "accepted": report.accepted}
    return found | counts | {"right": found["right"] and report.proposed > 0}


def sparse(answers: Answers) -> dict[str, Any]:
    """As many columns as tokens are exact attention; fewer answer alike by the kernel and by aten in blocks of rows."""
    exact, few = (dataclasses.replace(METHODS["SpecKV"], sparse_prefill=columns) for columns in (PROMPT, C))
    found = verdict(*(answers.of(each, lowering="eager")[0] for each in (exact, METHODS["SpecKV"])))
    ours, _ = answers.of(few, lowering="eager" if answers.run.tiny else "inductor")
    with aten_alone():
        plain, _ = answers.anew(few, lowering="eager", cudagraphs=False)
    return found if not found["right"] else verdict(ours, plain)


def beyond_int32(run: Run) -> dict[str, Any]:
    """Regions that were compiled for few tokens, on a batch whose MLP has more elements than 32 bits count."""
    length = 256 if run.tiny else 32768
    rows = 2 if run.tiny else INT32 // (WIDE["intermediate_size"] * length) + 1
    sizes = TINY if run.tiny else WIDE
    results = []
    for pruned in (True, False):
        model = make_model({**sizes, "initializer_range": 0.05}, run.device, seed=2)
        if pruned:
            lowering = "eager" if run.tiny else "inductor"
            specpass.compile(model, method=specpass.SnapKV(length, window=W), lowering=lowering)
        for count, columns in ((2, 128), (rows, length)):
            generator = torch.Generator().manual_seed(count)
            ids = torch.randint(1, sizes["vocab_size"], (count, columns), generator=generator).to(run.device)
            cache = specpass.BudgetCache(model.config, specpass.SnapKV(length, window=W)) if pruned else None
            with torch.no_grad():
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits.float()
        results.append(logits[:, -1])
        del model, cache
    off = float((results[0] - results[1]).abs().max() / results[1].abs().max())
    return {"right": off < 0.05, "relative_error": off, "elements": rows * length * sizes["intermediate_size"]}
