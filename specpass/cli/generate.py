"""`specpass generate`: answer one prompt, streaming, or as JSON for scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from specpass.cli import onnx as cli_onnx
from specpass.cli.group import INTERRUPTED
from specpass.cli.options import (
    Budget,
    CacheBits,
    Choice,
    Draft,
    DraftBits,
    Dropped,
    Dtype,
    Evict,
    Generated,
    Json,
    Lookahead,
    Lowering,
    MaxNewTokens,
    MethodName,
    Options,
    Quiet,
    Revision,
    ShareBudget,
    Speculate,
    Target,
    Then,
    Trust,
    Window,
    check_device,
    choose,
    encode,
    encode_question,
    encode_turn,
    example,
    load_pair,
    read_prompt,
    shown,
    silence_libraries,
)
from specpass.errors import CacheBitsError, DraftBitsError, DroppedError, GeneratedError, SpeculationError
from specpass.observe import progress

ORDER = 1


def add(app: typer.Typer) -> None:
    app.command(epilog=example('specpass generate -t smollm2-135m -m snapkv -p "Why is the sky blue?"'))(generate)


def generate(
    target: Target = "",
    draft: Draft = None,
    method: MethodName = "speckv",
    budget: Budget = "1024",
    window: Window = None,
    lookahead: Lookahead = None,
    speculate: Speculate = 0,
    draft_bits: DraftBits = None,
    generated: Generated = None,
    evict: Evict = "recent",
    share_budget: ShareBudget = False,
    dropped: Dropped = None,
    cache_bits: CacheBits = None,
    option: Options = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", "-f", help="The prompt as UTF-8 text.")] = None,
    then: Then = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, sample.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    answers: Annotated[
        int, typer.Option(min=1, help="Sample so many answers; the prompt is read and its cache held once.")
    ] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Feed the prompt as it is, without the chat template.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Dtype = "auto",
    lowering: Lowering = "inductor",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    prefix: Annotated[
        Path | None, typer.Option(help="A document's file by `specpass read`; the prompt is a question behind it.")
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="Answer from a folder of `specpass export`, without torch.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a prompt (--prompt, --prompt-file or stdin) from a KV cache of fixed budget; the answer streams.

    Ends with 0; 1 for a mistake, which is named; 2 for a wrong option; 130 after Ctrl-C, with what was written so far.
    """
    check_answers(answers, temperature, onnx, then)
    if onnx is not None:
        if prefix is not None:
            raise typer.BadParameter("is read by PyTorch models: leave --onnx out.", param_hint="--prefix")
        if then:
            raise typer.BadParameter("goes on from PyTorch models: leave --onnx out.", param_hint="--then")
        if target or draft or revision:
            raise typer.BadParameter(
                "holds its own models: leave --target, --draft and --revision out.", param_hint="--onnx"
            )
        text = read_prompt(prompt, prompt_file)
        with shown(quiet):
            answer = cli_onnx.generate(
                onnx, text, raw, as_json, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
            )
        _finish(answer, as_json)
        return
    if not target:
        raise typer.BadParameter("is missing: name a model, or an exported folder with --onnx.", param_hint="--target")
    choice = choose(
        target, draft, method, budget, window, lookahead, option, dtype, lowering, revision, trust_remote_code
    )
    choice = dataclasses.replace(choice, speculate=check_speculation(speculate, choice), draft_bits=draft_bits)
    choice = dataclasses.replace(
        choice, dropped=check_dropped(dropped, choice), cache_bits=check_cache_bits(cache_bits, choice)
    )
    choice = dataclasses.replace(choice, **check_bound(generated, evict, share_budget, choice))
    if draft_bits and choice.method is None:
        raise DraftBitsError(f"--draft-bits {draft_bits} needs a method with a draft, such as --method speckv.")
    text = read_prompt(prompt, prompt_file)
    check_device(device)
    if prefix is not None and choice.method is None:
        raise typer.BadParameter("needs a method that prunes: leave --method full out.", param_hint="--prefix")
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "num_return_sequences": answers}
    silence_libraries()
    with shown(quiet):
        asked = _Asked(text, raw, None if prefix is None else _loaded(prefix), tuple(then or ()))
        answer = _answer(choice, asked, device, seed, echo=not as_json, max_new_tokens=max_new_tokens, **sampling)
    _finish(answer, as_json)


def check_answers(count: int, temperature: float, onnx: Path | None, then: Any) -> None:
    """Raises: typer.BadParameter: several answers would be one, or something goes on from one alone."""
    if count == 1:
        return
    why = ""
    if temperature == 0:
        why = "would all be the likeliest tokens: add --temperature 0.8, say."
    elif onnx is not None:
        why = "share the cache of a PyTorch model: leave --onnx out."
    elif then:
        why = "cannot all be gone on from: leave --then out."
    if why:
        raise typer.BadParameter(why, param_hint=f"--answers {count}")


def check_speculation(count: int, choice: Choice) -> int:
    """Raises: SpeculationError: no draft reads the prompt."""
    if count == 0:
        return 0
    if choice.method is None:
        raise SpeculationError(f"--speculate {count} needs a method with a draft, such as --method speckv.")
    from specpass.backend.checks import check_speculate

    return check_speculate(count, choice.draft, choice.method)


def check_bound(generated: int | None, evict: str, share_budget: bool, choice: Choice) -> dict[str, Any]:
    """The options' fields. Raises: GeneratedError, SpeculationError."""
    from specpass.backend.checks import check_generated
    from specpass.cache.evict import Bound

    if generated is not None and choice.method is None:
        raise GeneratedError(f"--generated {generated} needs a method that prunes, such as --method snapkv.")
    if choice.method is None:
        Bound.of(generated, evict, share_budget)
    else:
        check_generated(generated, evict, share_budget, choice.method, choice.cache_bits or 0, choice.speculate)
    return {"generated": generated, "evict": evict, "share_budget": share_budget}


def check_dropped(place: str | None, choice: Choice) -> str | None:
    """Raises: DroppedError."""
    from specpass.cache.conversation import check_place

    if place is not None and choice.method is None:
        raise DroppedError(f"--dropped {place} needs a method that prunes, such as --method snapkv.")
    check_place(place)
    return place


def check_cache_bits(bits: int | None, choice: Choice) -> int | None:
    """Raises: CacheBitsError: no such bits, or no cache that could be in them."""
    if bits is None:
        return None
    if choice.method is None:
        raise CacheBitsError(f"--cache-bits {bits} needs a method that prunes, such as --method snapkv.")
    from specpass.cache.bits import check_bits

    return check_bits(bits, choice.method)


def _finish(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer, ensure_ascii=False))
    if "interrupt" in (answer["stopped"], *(turn["stopped"] for turn in answer.get("turns", ()))):
        raise typer.Exit(INTERRUPTED)


def _write(text: str, nl: bool) -> None:
    """A piece of the answer: from the first on, no bar may erase the line on which it stands."""
    if text:
        progress.leave()
    typer.echo(text, nl=nl)


def _loaded(prefix: Path) -> Any:
    import specpass

    return specpass.Prefix.load(prefix)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt, or a question behind a document's `prefix`, and the turns behind its answer."""

    text: str
    raw: bool
    prefix: Any
    then: tuple[str, ...] = ()

    def inputs(self, tokenizer: Any, device: str) -> dict[str, Any]:
        """Arguments for generate()."""
        if self.prefix is None:
            return dict(encode(tokenizer, self.text, self.raw, device))
        return {**encode_question(tokenizer, self.text, self.raw, device), "prefix": self.prefix}

    def further(self, tokenizer: Any, text: str, out: Any) -> dict[str, Any]:
        """Arguments for generate() of a turn behind what it returned."""
        import torch

        more = encode_turn(tokenizer, text, self.raw, int(out.sequences[0, -1]))
        ids = torch.cat([out.sequences, out.sequences.new_tensor([more])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": out.past_key_values}
        return inputs if self.prefix is None else {**inputs, "prefix": self.prefix}


@dataclasses.dataclass(frozen=True)
class _Answered:
    """An answer, and what generate() returned: None after an interrupt."""

    streamer: Any
    out: Any
    most: int

    @property
    def stopped(self) -> str:
        if self.out is None:
            return "interrupt"
        return "length" if len(self.streamer.ids) == self.most else "eos"

    def data(self) -> dict[str, Any]:
        ids = self.streamer.ids
        return {"text": self.streamer.text, "token_ids": ids, "stopped": self.stopped, "new_tokens": len(ids)}


def _answer(choice: Choice, asked: _Asked, device: str, seed: int, echo: bool, **options: Any) -> dict[str, Any]:
    """Generate and describe what came; an interrupt ends generation, not the description."""
    from transformers import set_seed

    import specpass
    from specpass.observe.layers import reading_by_layers
    from specpass.observe.storage import cache_bytes
    from specpass.observe.streaming import Several, Streamer
    from specpass.sizes import eos_ids

    start = time.perf_counter()
    model, _draft, tokenizer = load_pair(choice, device)
    loaded = time.perf_counter()
    inputs = asked.inputs(tokenizer, device)
    prompt_tokens, prefix_tokens = inputs["input_ids"].shape[1], len(inputs.get("prefix", ()))
    set_seed(seed)

    count, write = options.get("num_return_sequences", 1), _write if echo else None

    def answered(inputs: dict[str, Any]) -> _Answered:
        streamer: Any = Streamer(tokenizer, write)
        if count > 1:
            streamer = Several(tokenizer, eos_ids(model.generation_config), count, write)
        out = None
        try:
            with reading_by_layers(model) if choice.method is None else contextlib.nullcontext():
                out = model.generate(**inputs, streamer=streamer, return_dict_in_generate=True, **options)
        except KeyboardInterrupt:
            streamer.end()
        return _Answered(streamer, out, options["max_new_tokens"])

    answers = [answered(inputs)]
    several = [dataclasses.replace(answers[0], streamer=own) for own in getattr(answers[0].streamer, "own", ())]
    for text in asked.then:
        if answers[-1].out is None:
            break
        answers.append(answered(asked.further(tokenizer, text, answers[-1].out)))
    ended = time.perf_counter()
    report = None if choice.method is None else specpass.report(model)
    refusals = [] if report is None else list(report.refusals)
    if echo:
        for reason in refusals:
            typer.echo(f"note: nothing was pruned: {reason}", err=True)
    cache = None if answers[-1].out is None else answers[-1].out.past_key_values
    times = answers[0].streamer.times
    return {
        **answers[0].data(),
        "answers": [answer.data() for answer in several],
        "turns": [answer.data() for answer in answers[1:]],
        "target": choice.target,
        "draft": choice.draft,
        "method": choice.label,
        "prompt_tokens": prompt_tokens,
        "prefix_tokens": prefix_tokens,
        "free_tokens": 0 if report is None else report.replayed,
        "accepted_tokens": 0 if report is None else report.accepted,
        "kv_bytes": None if cache is None else cache_bytes(cache),
        "host_bytes": getattr(cache, "host_bytes", 0),
        "kept": None if report is None or report.kept is None else dataclasses.asdict(report.kept),
        "generated": None if report is None else report.data()["generated"],
        "refusals": refusals,
        "seconds": {
            "load": round(loaded - start, 3),
            "first_token": round(times[0] - loaded, 3) if times else None,  # compilation included
            "total": round(ended - start, 3),
        },
    }
