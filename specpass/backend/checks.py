"""Checks of models and arguments, made before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specpass.cache.evict import Bound
from specpass.capture.devices import device_of, name_of, spread_over
from specpass.errors import (
    BudgetError,
    DeviceMismatchError,
    DraftBitsError,
    EncoderDecoderError,
    FirstLayerError,
    FuturesError,
    GradientsError,
    MissingDraftError,
    NoCudaError,
    SeveralDevicesError,
    SpeculationError,
    TokenizerMismatchError,
    UnsupportedCallError,
)
from specpass.methods.base import NGRAM, Method, check_asked

OTHER_DRAFT = (
    "Use a draft of the same family, or pass both tokenizers, and the draft reads the prompt's text: "
    "specpass.compile(target, draft=draft, method=method, tokenizers=(the target's, the draft's))."
)
PADDING = 1024  # vocabularies that differ by less may be one tokenizer's, padded to different multiples


def check_method(method: Any) -> Method:
    if not isinstance(method, Method):
        raise BudgetError(f"method={method!r}: expected a method such as specpass.SpecKV(budget=1024).")
    return method


def check_lowering(lowering: str) -> None:
    if lowering not in ("inductor", "eager"):
        raise UnsupportedCallError(f"lowering={lowering!r}: expected 'inductor' or 'eager'.")


def check_cudagraphs(cudagraphs: bool | None) -> None:
    if cudagraphs and not torch.cuda.is_available():
        raise NoCudaError(
            "cudagraphs=True needs a CUDA device and a CUDA build of torch, and there is none here: leave it out."
        )


def check_draft(draft: Any, method: Method) -> None:
    """The draft is there where the method needs it, and is a decoder in eval mode."""
    if not method.drafts:
        return
    if draft is None:
        if method.needs_draft:
            instead = "" if method.prompt is not None else f"lookahead={NGRAM!r}, lookahead_ids=[B, L] token ids, "
            raise MissingDraftError(
                f"{method.name} looks ahead with a draft model and none was given: pass draft=a smaller model with the "
                f"same tokenizer (the target itself works too), {instead}or use SnapKV."
            )
        return
    check_asked(draft, method)
    check_decoder(draft, "draft")
    check_first_layer(draft, method)


def check_draft_bits(bits: Any, draft: nn.Module | None, method: Method) -> int | None:
    """Bits of the weights that a draft's steps read; None as they are."""
    if bits is None:
        return None
    if isinstance(bits, bool) or bits != 8:
        raise DraftBitsError(f"draft_bits={bits!r}: expected 8, or None for the draft's weights as they are.")
    if draft is None or not method.drafts:
        raise DraftBitsError(f"draft_bits=8 is said of a draft, and {method.name} has none here: pass draft=.")
    weight = next(draft.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        raise DraftBitsError(
            f"draft_bits=8 copies weights in bfloat16 on a CPU, and the draft's are {str(weight.dtype)[6:]} on "
            f"{weight.device.type}: leave it out, or load the draft with dtype=torch.bfloat16."
        )
    return 8


def check_speculate(count: Any, draft: Any, method: Method) -> int:
    """The number of tokens that a draft proposes at a time."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise SpeculationError(f"speculate={count!r}: expected how many tokens the draft proposes at a time, e.g. 4.")
    if count and (draft is None or not method.needs_draft):
        raise SpeculationError(
            f"speculate={count} needs a draft that reads the prompt, and {method.name} has none here: pass draft= with "
            "SpecKV, SpecKVPC or SpecPC, or give generate() an assistant_model."
        )
    if count and method.futures > 1:
        raise FuturesError(
            f"speculate={count} goes on behind one lookahead, and futures={method.futures}: leave one of them out."
        )
    return count


def check_generated(
    generated: Any, evict: Any, share_budget: bool, method: Method, bits: int, speculate: int
) -> Bound | None:
    """How generated tokens are bounded; None: they are not."""
    bound = Bound.of(generated, evict, share_budget)
    if bound is not None:
        bound.check(method, bits)
    if bound is not None and speculate:
        raise SpeculationError(
            f"speculate={speculate} takes proposed tokens back, and generated={generated} evicts others to make room "
            "for them, so answers would not be those without a speculator: leave one of them out."
        )
    return bound


def check_first_layer(draft: nn.Module, method: Method) -> None:
    """The draft layers that score prompt tokens exist."""
    if method.prompt is None:
        return
    layers = draft.config.get_text_config(decoder=True).num_hidden_layers
    first = method.prompt.first_layer
    if first is not None and first >= layers:
        raise FirstLayerError(
            f"first_layer={first}, but the draft has {layers} layers, 0 to {layers - 1}: no layer would score. Lower "
            "first_layer, or leave it out for min(8, layers // 3)."
        )


def check_decoder(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedCallError(
            f"{name}={type(model).__name__}: expected a Hugging Face model (AutoModelForCausalLM)."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise EncoderDecoderError(
            f"the {name} {type(model).__name__} is an encoder-decoder; specpass prunes the prompt of "
            "decoder-only models."
        )
    if model.training:
        raise GradientsError(f"the {name} is in training mode, and pruning has no backward: call {name}.eval() first.")


def check_pair(config: Any, device: torch.device, draft: nn.Module | None, *, by_text: bool = False) -> None:
    """A draft and a target, known by its config and its device, agree on device and, unless `by_text`, tokenizer.

    Their dtypes need not agree: the draft hands over token ids, and scores in float32.

    Raises: DeviceMismatchError, SeveralDevicesError, TokenizerMismatchError.
    """
    if draft is None:
        return
    check_one_device("draft", draft)
    check_same_device(device, draft)
    if not by_text:
        check_tokenizers(config, draft.config)


def check_same_device(device: torch.device, draft: nn.Module) -> None:
    """Graphs take a draft on the target's device.

    Raises: DeviceMismatchError.
    """
    theirs = device_of(draft)
    if device != theirs:
        raise DeviceMismatchError(
            f"the target is on {device} and the draft on {theirs}: move the draft with draft.to('{device}')."
        )


def check_one_device(name: str, model: nn.Module) -> None:
    """A graph computes on one device.

    Raises: SeveralDevicesError.
    """
    spread = spread_over(model)
    if spread:
        raise several(name, spread, name_of(device_of(model)))


def check_weights(devices: Iterable[torch.device]) -> None:
    """Of a target's graph: numbers beside the weights may lie on the CPU.

    Raises: SeveralDevicesError.
    """
    found = sorted({name_of(device) for device in devices if device.type not in ("cpu", "meta")})
    if len(found) > 1:
        raise several("target", " and ".join(found), found[0])


def several(name: str, spread: str, first: str) -> SeveralDevicesError:
    """Args: spread: the devices. first: one of them."""
    other = "use specpass.compile(model, ...), which runs such a target's own forward, or " * (name == "target")
    return SeveralDevicesError(
        f"the {name} is spread over {spread}, and a graph computes on one device: {other}load it with "
        f"device_map={{'': '{first}'}}, quantised or with a part of it offloaded to the CPU if it does not fit."
    )


def check_places(target: nn.Module, draft: nn.Module | None, method: Method) -> None:
    """Where one of two models is spread over devices, both may lie anywhere: no graph joins them.

    Raises: SeveralDevicesError: the draft's graphs are needed. DeviceMismatchError: neither is spread.
    """
    if draft is None:
        return
    spread = spread_over(draft)
    if spread and method.prompt is not None:
        raise SeveralDevicesError(
            f"the draft is spread over {spread}, and {method.name} reads its attention in graphs, which compute on one "
            f"device: load it with device_map={{'': '{name_of(device_of(draft))}'}}, or use SpecKV."
        )
    if not spread and not spread_over(target):
        check_same_device(device_of(target), draft)


def check_tokenizers(target: Any, draft: Any) -> None:
    """Same tokenizer, by the tokenizer files beside the weights where there are any, else by vocabulary size.

    A family pads config.vocab_size differently by model size; that alone is no mismatch.
    """
    ours, theirs = (_vocabulary(config) for config in (target, draft))
    if ours is not None and theirs is not None:
        unlike = sum(1 for token, index in theirs.items() if ours.get(token) != index)
        if unlike or len(ours) != len(theirs):
            raise TokenizerMismatchError(
                f"draft and target have different tokenizers: {unlike} of the draft's {len(theirs)} tokens mean "
                f"something else to the target, which has {len(ours)}. {OTHER_DRAFT}"
            )
        return
    sizes = [config.get_text_config(decoder=True).vocab_size for config in (target, draft)]
    if abs(sizes[0] - sizes[1]) >= PADDING or 2 * min(sizes) <= max(sizes):
        raise TokenizerMismatchError(
            f"the target's vocabulary has {sizes[0]} tokens and the draft's {sizes[1]}: more than padding can explain, "
            f"so their tokenizers differ. {OTHER_DRAFT}"
        )


def _vocabulary(config: Any) -> dict[str, int] | None:
    file = Path(getattr(config, "_name_or_path", "") or "/nonexistent") / "tokenizer.json"
    return _read_vocabulary(file, file.stat().st_mtime_ns) if file.is_file() else None


@functools.lru_cache(maxsize=8)
def _read_vocabulary(file: Path, changed: int) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
