"""A lookahead that the target writes itself (`lookahead="self"`): its own cheap future, where there is no draft.

The target reads the prompt in full, and what its window alone asks for (SnapKV) is pruned into a cache beside the
caller's, from which it writes L tokens. These, and the window, then go through the target once more against all of the
prompt's keys and values, which are held on the device until each layer has scored them. The second look is what a
question behind a document is (behind.py); so questions, and turns with dropped="host", are read in this way too.

Source: Lookahead Q-Cache (LAQ), arXiv 2505.20334.

Symbols: B batch, S prompt, L lookahead, W window, C budget.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend.behind import Behind, why_nothing_is_held
from specpass.cache.budget import BudgetCache
from specpass.cache.prefix import Pair
from specpass.cache.prompt import check_gradients, check_prompt, positions_of, tokens_of
from specpass.dialect.define import SPEC
from specpass.errors import LookaheadError
from specpass.interpret.beside import features, types_mask
from specpass.interpret.question import Front, Question, Rows
from specpass.methods.base import SELF, Method
from specpass.methods.snapkv import SnapKV
from specpass.observe import progress
from specpass.observe.storage import cache_bytes
from specpass.parallel.agree import first_ranks
from specpass.reports.record import WholeRecord
from specpass.rewrite import Refusal
from specpass.sizes import pad_id


@dataclasses.dataclass
class Itself:
    """Prompts of one compiled target that writes its own lookahead.

    Args: call: the compiled target, for the lookahead's steps.
    """

    behind: Behind
    call: Callable[..., Any]

    @staticmethod
    def writes(cache: BudgetCache, kwargs: dict[str, Any]) -> bool:
        """Whether a call is a prompt that needs such a lookahead: it does not fit the budget, and nobody gave one."""
        if cache.filled or not cache.method.writes_itself or cache.given_ids is not None:
            return False
        tokens = tokens_of(kwargs)
        return not (cache.early_exit and isinstance(tokens, Tensor) and tokens.shape[1] <= cache.whole)

    def __call__(self, cache: BudgetCache, kwargs: dict[str, Any]) -> Any:
        """The model's output for a prompt, which is pruned into the empty cache.

        Raises: LookaheadError: a layer or the prompt is none that can be read twice. MaskError.
        """
        target, backend = self.behind.target, self.behind.backend
        check_gradients(target.parameters())
        ids = self._checked(kwargs)
        backend.check_cache(cache)
        mask = kwargs.get("attention_mask")
        check_prompt(cache, (len(ids), ids.shape[1]), mask, 0, None)
        backend.report.saw(cache.config)
        rows = Rows.packed(ids, mask, ids.shape[1])
        try:
            out = self.read(cache, kwargs, rows, Front({}, mismatch=LookaheadError), rows.size, None)
        except Refusal as refusal:
            cache.reset()
            raise refused(refusal) from refusal
        except BaseException:
            cache.reset()
            raise
        cache.seen = torch.full((), ids.shape[1], dtype=torch.int64, device=ids.device)
        cache.padded = mask is not None and not bool(mask.all())
        backend.report.note(f"prompts with lookahead={SELF!r}: the model's own forward reads them, not a graph")
        return out

    def _checked(self, kwargs: dict[str, Any]) -> Tensor:
        """[B, S] ids.

        Raises: LookaheadError: something else comes than a prompt's ids, or something beside them.
        """
        ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        beside = [*features(kwargs), *(["token_type_ids"] if types_mask(self.behind.target, kwargs) else [])]
        if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None or beside:
            what = beside[0] if beside else "inputs_embeds"
            raise refused(f"{what} came with the prompt, which is read twice, and by its token ids alone")
        if mask is not None and mask.dim() != 2:
            raise refused(f"attention_mask is {tuple(mask.shape)}, and prompts are padded by a mask [B, S]")
        if positions is not None:
            counted = positions_of(torch.ones_like(ids) if mask is None else mask)
            if not bool(((positions == counted) | (counted == 0)).all()):
                raise refused("position_ids do not count the prompt's tokens from 0")
        if not isinstance(kwargs.get("logits_to_keep", 0), int):
            raise refused("logits_to_keep is no number of rows")
        return ids

    def read(
        self, cache: BudgetCache, kwargs: dict[str, Any], rows: Rows, front: Front, count: int, ahead: Tensor | None
    ) -> Any:
        """As Behind.read, with the target's own lookahead where the method wants it and `ahead` is not given.

        Raises: Refusal: a layer cannot be pruned so.
        """
        behind, method = self.behind, cache.method
        if ahead is not None or not method.writes_itself or behind.fits(cache, rows):
            return behind.read(cache, kwargs, rows, front, count, ahead)
        held: dict[int, Pair] = {}
        beside, out = self._first_look(cache, kwargs, rows, front, count, held)
        ahead = first_ranks(self._written(beside, rows, out.logits[:, -1:]), behind.backend.ranks)
        whole = sum(states.nbytes for pair in held.values() for states in pair)
        record = WholeRecord(len(rows.ids), rows.size, cache.lookahead, whole, cache_bytes(beside))
        out.past_key_values = cache
        del beside  # in front of the second look, which fills the caller's cache

        def let_go(layer: int, key: Tensor, value: Tensor) -> None:
            held.pop(layer, None)  # the call has them joined to its own

        again = {"logits_to_keep": 1, "output_hidden_states": kwargs.get("output_hidden_states")}
        behind.read(cache, again, rows, Front(held, let_go, front.mismatch), min(rows.size, method.window), ahead)
        behind.backend.report.whole = record
        return out

    def _first_look(
        self, cache: BudgetCache, kwargs: dict[str, Any], rows: Rows, front: Front, count: int, held: dict[int, Pair]
    ) -> tuple[BudgetCache, Any]:
        """A cache of what the window alone keeps, and the model's output for the call's rows.

        Args: held: gets each layer's keys [B, K, S, D] and values, packed.

        Raises: Refusal: a layer cannot be pruned so.
        """
        behind, backend = self.behind, self.behind.backend
        beside = BudgetCache(cache.config, cache.method, cache.max_new_tokens, cache_bits=cache.bits or None)

        def hold(layer: int, key: Tensor, value: Tensor) -> None:
            held[layer] = (own(key), own(value))
            if front.hold is not None:
                front.hold(layer, key, value)

        told = Front(front.layers, hold, front.mismatch)
        question = Question(behind.target, beside, kwargs, eos_ids=backend.eos_ids(cache), front=told, rows=rows)
        out, _, _, exact = question.read(count, None, False, False, by_window(cache.method))
        behind.check_exact(exact)
        behind.go_on(beside)
        beside.seen = torch.full((), rows.size, dtype=torch.int64, device=rows.ids.device)
        beside.padded = not rows.even
        return beside, out

    def _written(self, beside: BudgetCache, rows: Rows, logits: Tensor) -> Tensor:
        """[B, L] tokens behind the prompt, whose last logits [B, 1, V] are given, written from a pruned cache."""
        method, config = beside.method, beside.config
        ends, pad = list(self.behind.backend.eos_ids(beside)), pad_id(config)
        ended = torch.zeros_like(rows.lengths, dtype=torch.bool)
        written: list[Tensor] = []
        keeps = "logits_to_keep" in inspect.signature(self.behind.target.forward).parameters
        as_generate: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}  # one graph for its steps and these
        with progress.task("the target looks ahead"):
            for index in range(beside.lookahead):
                if index:
                    position = (rows.lengths + (index - 1))[:, None].clone()  # no view: a graph would ask for its base
                    step = {"input_ids": written[-1], "past_key_values": beside, "position_ids": position}
                    logits = self.call(**step, **as_generate).logits
                how = (config.vocab_size, method.temperature, method.seed, index, ends, pad)
                token, ended = SPEC.next_token(logits, ended, *how)
                written.append(token.clone())
        return torch.cat(written, 1)


def check_writes(target: nn.Module, method: Method) -> None:
    """Raises: LookaheadError: the target or the method cannot look at a prompt twice."""
    if not method.writes_itself:
        return
    alike = "and the slots that the lookahead is written from are as many for each KV head, and for each prompt"
    reasons = (
        f"spread={method.spread!r} shares budgets, {alike}" if method.spread != "uniform" else "",
        f"share={method.share} chooses a budget, {alike}" if method.share is not None else "",
        why_nothing_is_held(target, method, by_text=False),
    )
    reason = next((reason for reason in reasons if reason), "")
    if reason:
        raise refused(reason)


def by_window(method: Method) -> SnapKV:
    """How a prompt is pruned for the lookahead to be written: as SnapKV does, with the method's own sizes."""
    same = {name: getattr(method, name) for name in ("kernel", "value_norms", "reconstruction")}
    return SnapKV(method.budget, method.window, **same)


def own(states: Tensor) -> Tensor:
    """In a storage of its own: what a model hands over may be a part of something larger."""
    return states if states.untyped_storage().nbytes() == states.nbytes else states.clone()


def refused(reason: object) -> LookaheadError:
    return LookaheadError(
        f"lookahead={SELF!r} is not to be had: {reason}. Use a draft, lookahead='ngram', SnapKV, or another model."
    )
