"""What commands share: their common options, the pair of models, the prompt, the example at the end of their help."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from specpass.errors import MissingDraftError, OutputFileError, PromptError, TokenizerMismatchError
from specpass.files import COMPILED, INDUCTOR, check_folder
from specpass.methods.base import Method, check_asked
from specpass.methods.registry import FULL, make_method, names
from specpass.observe.display import progress

MARK = "<document and question>"  # stands for them while a chat template is applied
MODELS = "name (see `specpass models list`), hub id, folder, or GGUF file"

Target = Annotated[str, typer.Option("--target", "-t", help=f"The model that answers: {MODELS}.")]
Draft = Annotated[str | None, typer.Option("--draft", "-d", help=f"The small model that looks ahead: {MODELS}.")]
Revision = Annotated[
    str | None, typer.Option(help="The target's branch, tag or commit on the hub; a draft's: OWNER/NAME@REVISION.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that models bring along.")]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help=f"{', '.join(names())}; best, best-pc, best-kvpc: speckv, specpc and speckv-pc with what measured best; "
        f"or {FULL}: no pruning.",
    ),
]
Budget = Annotated[
    str, typer.Option("--budget", "-b", help="KV slots per KV head and layer, a ratio such as 0.25, or auto.")
]
Window = Annotated[int | None, typer.Option(help="The last WINDOW prompt tokens are always kept.")]
Lookahead = Annotated[
    str | None,
    typer.Option(
        help="Tokens that the draft writes ahead; min(32, max-new-tokens) if left out. No draft: ngram, the prompt's "
        "own; self, the target's from a pruned cache."
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Another field of the method, NAME=VALUE; repeatable.")
]
Speculate = Annotated[
    int, typer.Option(min=0, help="Tokens that the draft proposes at a time behind its lookahead; 0: none.")
]
DraftBits = Annotated[
    int | None, typer.Option(help="8: the draft's steps read copies of its weights in 8 bits (bfloat16, on a CPU).")
]
Generated = Annotated[
    int | None, typer.Option(help="KV slots for the answer's own tokens: beyond them older ones are evicted.")
]
Evict = Annotated[
    str,
    typer.Option(
        help="Which of these stay beside the newest: recent, attention, lookahead, rkv, redundant, triattention, or "
        "random."
    ),
]
ShareBudget = Annotated[bool, typer.Option(help="Evict the prompt's slots alike: both share one budget.")]
Dropped = Annotated[
    str | None, typer.Option(help="host: what is dropped stays in host memory, and each turn (--then) chooses anew.")
]
Then = Annotated[list[str] | None, typer.Option(help="A further turn behind the answer; may be repeated.")]
CacheBits = Annotated[
    int | None,
    typer.Option(help="8, 4 or 2: bits of each number of the prompt's KV slots; left out: the model's dtype."),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")]
Lowering = Annotated[str, typer.Option(help="inductor, or eager: the same passes without a compiler.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]


def shown(quiet: bool) -> contextlib.AbstractContextManager[None]:
    """What takes long inside is shown on stderr; nothing where `quiet`."""
    return contextlib.nullcontext() if quiet else progress()


def silence_libraries() -> None:
    """No bars of transformers' among ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def example(line: str) -> str:
    """The end of a command's help: a line that works."""
    return f"Example: [bold]{line}[/bold]"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The models and the method that the options name; nothing is loaded yet. `method` None: full KV.

    `speculate`: tokens that the draft proposes at a time. `draft_bits`: of the weights that its steps read.
    `generated`, `evict`: slots for the answer's tokens, and which stay; `share_budget`: with the prompt's.
    `dropped`: where what is dropped stays.
    `cache_bits`: of the prompt's slots. `trust`: code that the models bring along may run.
    """

    target: str
    draft: str | None
    method: Method | None
    dtype: str
    lowering: str
    speculate: int = 0
    draft_bits: int | None = None
    generated: int | None = None
    evict: str = "recent"
    share_budget: bool = False
    dropped: str | None = None
    cache_bits: int | None = None
    trust: bool = False

    @property
    def label(self) -> str:
        return "full KV" if self.method is None else self.method.key


def check_words(dtype: str, lowering: str) -> None:
    """Raises: typer.BadParameter for a word that no model can be loaded or compiled with; OutputFileError."""
    if lowering not in ("inductor", "eager"):
        raise typer.BadParameter(f"{lowering!r} is neither 'inductor' nor 'eager'.", param_hint="--lowering")
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype!r} is none of auto, bfloat16, float16, float32.", param_hint="--dtype")
    variable = COMPILED if os.environ.get(COMPILED) else INDUCTOR
    if lowering == "inductor" and (kept := os.environ.get(variable)):
        try:
            check_folder(Path(kept))
        except OutputFileError as error:
            raise OutputFileError(f"{variable}, where torch keeps what it compiles: {error}") from error


def check_device(device: str) -> None:
    """Raises: typer.BadParameter for a device that torch cannot put a tensor on."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(
            f"{device!r}: torch cannot use it here ({reason}). Leave it out for the CPU.", param_hint="--device"
        ) from error


def choose(
    target: str,
    draft: str | None,
    method: str,
    budget: str,
    window: int | None,
    lookahead: str | None,
    options: list[str] | None,
    dtype: str,
    lowering: str,
    revision: str | None = None,
    trust: bool = False,
) -> Choice:
    """Check the options before any model is loaded.

    Raises: MethodOptionError, BudgetError, MissingDraftError, LookaheadError, typer.BadParameter.
    """
    from specpass import hub

    check_words(dtype, lowering)
    target = hub.at_revision(target, revision)
    if method.lower() == FULL:
        return Choice(target, None, None, dtype, lowering, trust=trust)
    made = make_method(method, budget, options or (), window=window, lookahead=lookahead)
    if not made.drafts:
        if draft is not None:
            typer.echo(f"note: {made.name} asks no draft; --draft {draft} is not loaded", err=True)
        draft = None
    elif draft is None and made.needs_draft:
        raise MissingDraftError(
            f"{made.name} looks ahead with a draft model: add --draft NAME, a small model with the target's tokenizer "
            "(the target itself works too), or do without: --lookahead ngram or self (speckv), --method snapkv."
        )
    check_asked(draft, made)
    return Choice(target, draft, made, dtype, lowering, trust=trust)


def load_pair(choice: Choice, device: str = "cpu") -> tuple[Any, Any, Any]:
    """(compiled target, draft or None, tokenizer); raises what hub.load and specpass.compile raise."""
    import specpass
    from specpass import hub

    target, tokenizer = hub.load(choice.target, choice.dtype, trust_remote_code=choice.trust)
    target.requires_grad_(False).to(device)
    if choice.method is None:
        note_slow(target.dtype, target.device.type)
    draft, tokenizers = None, None
    if choice.draft == choice.target:
        draft = target
    elif choice.draft is not None:
        draft, own = hub.load(choice.draft, choice.dtype, trust_remote_code=choice.trust)
        if reads_text(target.config, draft.config):
            tokenizers = (tokenizer, own)
        draft.requires_grad_(False).to(device)
        sizes = [sum(weight.numel() for weight in model.parameters()) for model in (draft, target)]
        if sizes[0] > sizes[1]:
            typer.echo(
                f"note: the draft has more parameters ({sizes[0]:,}) than the target ({sizes[1]:,}): are --target and "
                "--draft swapped?",
                err=True,
            )
    if choice.method is not None:
        specpass.compile(
            target,
            draft=draft,
            method=choice.method,
            lowering=choice.lowering,
            speculate=choice.speculate,
            draft_bits=choice.draft_bits,
            generated=choice.generated,
            evict=choice.evict,
            share_budget=choice.share_budget,
            dropped=choice.dropped,
            cache_bits=choice.cache_bits,
            tokenizers=tokenizers,
        )
    return target, draft, tokenizer


def note_slow(dtype: Any, device: str) -> None:
    """Say so where the CPU has no instructions for a dtype: compiled graphs multiply in float32 there."""
    from specpass.kernels.cpu.isa import multiplies

    if device == "cpu" and not multiplies(dtype):
        name = str(dtype).removeprefix("torch.")
        typer.echo(
            f"note: this CPU has no instructions for {name}, in which it reads prompts several times slower than in "
            "float32: --dtype float32 is faster, and takes twice the memory; with a method no such dtype is slow",
            err=True,
        )


def reads_text(target: Any, draft: Any) -> bool:
    """Whether two models, known by their configs, have different tokenizers; a note says so."""
    from specpass.backend.checks import check_tokenizers

    try:
        check_tokenizers(target, draft)
    except TokenizerMismatchError:
        typer.echo("note: the draft has another tokenizer than the target: it reads the prompt's text", err=True)
        return True
    return False


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from --prompt, --prompt-file, or stdin where neither is given.

    Raises: PromptError: both, none (stdin is a terminal), empty, or not UTF-8.
    """
    if prompt is not None and file is not None:
        raise PromptError("--prompt and --prompt-file are both given: leave one out.")
    if prompt is None and file is None and sys.stdin.isatty():
        raise PromptError("no prompt: pass --prompt TEXT or --prompt-file FILE, or pipe a text to stdin.")
    try:
        text = prompt if prompt is not None else file.read_text("utf-8") if file is not None else sys.stdin.read()
    except OSError as error:
        raise PromptError(f"the prompt in {file or 'stdin'} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt in {file or 'stdin'} is no UTF-8 text: {error.reason} 0x{error.object[error.start]:02x} at "
            f"byte {error.start}."
        ) from error
    if not text.strip():
        raise PromptError(
            "the prompt is empty: pass --prompt TEXT or --prompt-file FILE that holds text, or pipe a text to stdin."
        )
    return text


def template_of(tokenizer: Any) -> Any:
    """The tokenizer's chat template, to be called with messages.

    Raises: PromptError: it has none.
    """
    if not tokenizer.chat_template:
        raise PromptError("the model's tokenizer has no chat template: pass --raw to feed the prompt as it is.")
    return tokenizer.apply_chat_template


def around_document(tokenizer: Any, raw: bool) -> tuple[str, str]:
    """What stands in front of a document and behind a question: the chat template's words around a user's message."""
    if raw:
        return "", ""
    chat = [{"role": "user", "content": MARK}]
    front, back = template_of(tokenizer)(chat, add_generation_prompt=True, tokenize=False).split(MARK)
    return front, back


def encode_document(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """Token ids of a document as the beginning of a prompt: of a user's message in the chat template unless `raw`.

    Raises: PromptError: the tokenizer has no chat template.
    """
    front, _ = around_document(tokenizer, raw)
    return list(tokenizer(front + text, add_special_tokens=raw).input_ids)


def encode_question(tokenizer: Any, text: str, raw: bool, device: str = "cpu") -> Any:
    """A question [1, Q] behind such a document: a paragraph of its own, and the message's end, unless `raw`.

    Raises: PromptError: the tokenizer has no chat template.
    """
    _, back = around_document(tokenizer, raw)
    text = text if raw else f"\n\n{text}{back}"
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)


def encode_turn(tokenizer: Any, text: str, raw: bool, last: int) -> list[int]:
    """Token ids of a user's next message behind an answer, whose `last` token may be its end, unless `raw`.

    Raises: PromptError: the tokenizer has no chat template.
    """
    if raw:
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    roles = (("user", "-"), ("assistant", MARK), ("user", text))
    chat = [{"role": role, "content": content} for role, content in roles]
    _, piece = template_of(tokenizer)(chat, add_generation_prompt=True, tokenize=False).split(MARK, 1)
    ids = list(tokenizer(piece, add_special_tokens=False).input_ids)
    return ids[1:] if ids[:1] == [last] else ids


def encode(tokenizer: Any, text: str, raw: bool, device: str = "cpu") -> Any:
    """The prompt as model inputs [1, S], as a user's message in the chat template unless `raw`.

    Raises: PromptError: the tokenizer has no chat template.
    """
    if raw:
        return tokenizer(text, return_tensors="pt").to(device)
    chat = [{"role": "user", "content": text}]
    inputs = template_of(tokenizer)(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs.to(device)
