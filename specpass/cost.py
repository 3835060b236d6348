"""What a method costs, as closed forms in the prompt length S: FLOPs, bytes moved, bytes of KV cache.

Counting rules. FLOPs: two per multiply-add of the matrix products, the causal half of attention in full (as torch's
counter does). Bytes moved: each weight once a pass, keys and values written once and read once; activations are left
out. Everything holds for prompts longer than the budget; a shorter one is kept whole and costs what full KV costs.

Symbols: B batch, S prompt, L lookahead, W window rows that score, C budget, N free slots, M new tokens; n layers,
E hidden, H heads, K key/value heads, D head size, I intermediate, m matrices of the MLP, V vocabulary, b bytes of a
number. The draft's own have an index d. The forms follow the rewritten graph; tests hold them to measured counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import sympy
from sympy import Expr, Symbol

from specpass.decoder import Decoder
from specpass.methods import Method

B, S, L, W, C, N, M = (Symbol(name, positive=True) for name in "BSLWCNM")

# Methods whose target reads the whole prompt and keeps C slots of each KV head. Others have no closed form here yet.
PRUNES_KV = frozenset({"SpecKV", "SnapKV", "StreamingLLM", "PyramidKV"})
BREAK_EVENS = ("kv_bytes", "bytes", "flops")


@dataclasses.dataclass(frozen=True)
class Forms:
    """The closed forms of one decoder, over symbols with an optional index ("d" for the draft)."""

    index: str = ""

    def __getattr__(self, name: str) -> Symbol:
        return Symbol(f"{name}_{self.index}" if self.index else name, positive=True)

    def layer(self) -> Expr:
        """Numbers in one layer's weight matrices."""
        return 2 * self.E * self.H * self.D + 2 * self.E * self.K * self.D + self.m * self.E * self.I

    def flops(self, rows: Any, columns: Any, heads: Any) -> Expr:
        """`rows` new tokens of each prompt against `columns` keys; logits of `heads` rows."""
        linear = 2 * B * rows * self.n * self.layer()
        return linear + 4 * B * rows * columns * self.n * self.H * self.D + 2 * B * heads * self.E * self.V

    def weights(self) -> Expr:
        """Bytes of the weights that one pass reads."""
        return self.b * (self.n * self.layer() + self.E * self.V)

    def kv(self, slots: Any) -> Expr:
        """Bytes of keys and values in `slots` slots of every layer and head."""
        return 2 * self.n * B * self.K * self.D * slots * self.b

    def values(self, decoder: Decoder) -> dict[Symbol, int]:
        fields = {"n": "layers", "E": "hidden", "H": "heads", "K": "kv_heads", "D": "head_dim", "I": "intermediate",
                  "m": "mlp_matrices", "V": "vocab", "b": "itemsize"}
        return {getattr(self, symbol): getattr(decoder, field) for symbol, field in fields.items()}


_T, _D = Forms(), Forms("d")


def full_forms() -> dict[str, Expr]:
    """Full KV: prefill, one decode step behind M / 2 of M new tokens, the cache."""
    middle = S + M / 2
    return {
        "prefill_flops": _T.flops(S, S, 1),
        "prefill_bytes": _T.weights() + 2 * _T.kv(S),
        "draft_flops": sympy.Integer(0),
        "draft_bytes": sympy.Integer(0),
        "decode_flops": _T.flops(1, middle, 1),
        "decode_bytes": _T.weights() + _T.kv(middle),
        "kv_bytes": _T.kv(S),
    }


def pruned_forms(scored: bool, lookahead: bool, drafts: bool) -> dict[str, Expr]:
    """The target reads S (+ L) tokens, scores W (+ L) rows, keeps C of each head; a draft writes L tokens.

    Args: scored: whether rows are scored. lookahead: whether L tokens stand behind the prompt. drafts: whether a draft
    writes them (and not the caller).
    """
    ahead = L if lookahead else sympy.Integer(0)
    read = S + ahead
    flops = _T.flops(read, read, 1)
    moved = _T.weights() + 2 * _T.kv(read) + _T.kv(C + N)
    if scored:
        flops += 2 * B * _T.n * _T.H * _T.D * (W + ahead) * read
        moved += _T.kv(read) / 2  # the keys once more
    zero = sympy.Integer(0)
    steps = L - 1
    return {
        "prefill_flops": flops,
        "prefill_bytes": moved,
        "draft_flops": _D.flops(S, S, 1) + steps * _D.flops(1, S + L, 1) if drafts else zero,
        "draft_bytes": _D.weights() * L + 2 * _D.kv(S) + steps * _D.kv(S + L) if drafts else zero,
        "decode_flops": _T.flops(1, C + N, 1),
        "decode_bytes": _T.weights() + _T.kv(C + N),
        # and int64 positions, lengths and lookahead ids
        "kv_bytes": _T.kv(C + N) + 8 * B * (_T.n * _T.K * (C + 1) + ahead),
    }


@dataclasses.dataclass(frozen=True)
class Costs:
    """Closed forms of a method beside those of full KV, and the numbers of one model, draft and method."""

    full: dict[str, Expr]
    pruned: dict[str, Expr]
    method: Method
    layers: int
    values: Mapping[Symbol, Any]

    def numbers(self, prompt: int, new_tokens: int, batch: int = 1) -> dict[str, tuple[int, int]]:
        """Name -> (full KV, the method) for a prompt of `prompt` tokens."""
        values = self._values(prompt, new_tokens, batch)
        whole = prompt <= values[C]  # neither draft nor scores: see the module's docstring
        found = {}
        for name, full in self.full.items():
            kept = full if whole and name not in ("kv_bytes", "decode_flops", "decode_bytes") else self.pruned[name]
            found[name] = (round(float(full.subs(values))), round(float(kept.subs(values))))
        return found

    def _values(self, prompt: int, new_tokens: int, batch: int) -> dict[Symbol, Any]:
        from specpass.cache import round_room

        budgets = self.method.resolve(prompt).layer_budgets(self.layers)
        mean = sympy.Rational(sum(budgets), len(budgets))
        ahead = {} if L in self.values else {L: new_tokens}  # lookahead=None drafts the whole answer
        return {**self.values, **ahead, B: batch, S: prompt, C: mean, N: round_room(new_tokens), M: new_tokens}

    def break_even(self, what: str, new_tokens: int, batch: int = 1) -> int | None:
        """The shortest prompt from which a generation of `new_tokens` costs no more than with full KV; None: never.

        Args: what: "kv_bytes" (the cache at the end), "bytes" or "flops" (prefill, draft and all decode steps).
        """
        values = self._values(1 << 20, new_tokens, batch)
        for name in (S, C):
            values.pop(name)
        budget = self.method.budget
        slots = budget * S if isinstance(budget, float) else self._values(1 << 20, 1, 1)[C]
        gain = sympy.Poly((_total(self.full, what) - _total(self.pruned, what)).subs(values).subs(C, slots), S)
        least = 1 if isinstance(budget, float) else int(slots) + 1
        starts = [least, *(int(sympy.floor(root)) + 1 for root in gain.real_roots() if root > least)]
        return next((start for start in sorted(starts) if gain.eval(start) >= 0), None)


def _total(forms: dict[str, Expr], what: str) -> Expr:
    """One generation: prefill, draft and M - 1 decode steps (the mean step stands for each); or the cache after it."""
    if what == "kv_bytes":
        return forms["kv_bytes"].subs(S, S + M - 1)
    return forms[f"prefill_{what}"] + forms[f"draft_{what}"] + (M - 1) * forms[f"decode_{what}"]


def costs_of(method: Method, target: Decoder, draft: Decoder | None = None) -> Costs | None:
    """The costs of `method` on a target; None where the method has no closed form (see PRUNES_KV)."""
    if method.name not in PRUNES_KV:
        return None
    drafts = method.drafts and getattr(method, "lookahead_ids", None) is None
    if drafts and draft is None:
        return None
    values: dict[Symbol, Any] = {**_T.values(target), W: method.window}
    if drafts and draft is not None:
        values |= _D.values(draft)
    length = getattr(method, "lookahead", None)
    if length is not None or not method.drafts:
        values[L] = length or 0
    forms = pruned_forms(method.scored, method.drafts, drafts)
    return Costs(full_forms(), forms, method, target.layers, values)
