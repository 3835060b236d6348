"""What a method costs, as closed forms in the prompt length S: FLOPs, bytes moved, bytes of KV cache.

Counting rules. FLOPs: two per multiply-add of the matrix products, the causal half of attention in full (as torch's
counter does). Bytes moved: each weight once a pass, keys and values written once and read once; activations are left
out. N is M rounded up to a multiple of 64; beyond 512 it grows by half whenever it is full (cache/layer.py), to what
the cache ends with. Everything holds for prompts longer than the budget; a shorter one is kept whole and costs what
full KV costs.

Symbols: B batch, S prompt, L lookahead, W window rows that score, C budget, N free slots, M new tokens; n layers,
E hidden, H heads, K key/value heads, D head size, I intermediate, m matrices of the MLP, V vocabulary, b bytes of a
number. The draft's own have an index d. Where the prompt is compressed: C_p prompt tokens that the target reads, W_p
rows of the draft's window that score, n_p draft layers that score. Budgets that differ by layer enter as their mean,
which is exact: everything is linear in C. Where each prompt's budget is chosen, C is the largest
that it may get. Where prompts are quantised, q bytes of keys and values a slot of each KV head, C_q slots with those
that make groups whole, f bytes of a KV head's low rank. The forms follow the rewritten graph; tests hold them to
measured counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import sympy
from sympy import Expr, Symbol

from specpass.bits import GROUP, Layout, blocks_of, why_unserved
from specpass.cache.layer import room_of, round_room
from specpass.methods.base import BUDGET_STEP, CANDIDATES, Method, is_builtin
from specpass.sizes import Decoder

B, S, L, W, C, N, M = (Symbol(name, positive=True) for name in "BSLWCNM")
C_Q, Q, F = (Symbol(name, positive=True) for name in ("C_q", "q", "f"))
C_P, W_P, N_P = (Symbol(name, positive=True) for name in ("C_p", "W_p", "n_p"))

BREAK_EVENS = ("kv_bytes", "bytes", "flops")


Amount: TypeAlias = "Expr | int"  # of rows, slots or layers


@dataclasses.dataclass(frozen=True)
class Forms:
    """The closed forms of one decoder, over symbols with an optional index ("d" for the draft)."""

    index: str = ""

    def __getattr__(self, name: str) -> Symbol:
        return Symbol(f"{name}_{self.index}" if self.index else name, positive=True)

    def layer(self) -> Expr:
        """Numbers in one layer's weight matrices."""
        return 2 * self.E * self.H * self.D + 2 * self.E * self.K * self.D + self.m * self.E * self.I

    def flops(self, rows: Amount, columns: Amount, heads: Amount) -> Expr:
        """`rows` new tokens of each prompt against `columns` keys; logits of `heads` rows."""
        linear = 2 * B * rows * self.n * self.layer()
        return linear + 4 * B * rows * columns * self.n * self.H * self.D + 2 * B * heads * self.E * self.V

    def unread(self, rows: Amount) -> Expr:
        """FLOPs behind the last layer's attention of `rows` tokens that nothing reads: they are left out."""
        return 2 * B * rows * (self.E * self.H * self.D + self.m * self.E * self.I)

    def weights(self) -> Expr:
        """Bytes of the weights that one pass reads."""
        return self.b * (self.n * self.layer() + self.E * self.V)

    def kv(self, slots: Amount) -> Expr:
        """Bytes of keys and values in `slots` slots of every layer and head."""
        return 2 * self.keys(slots, self.n)

    def keys(self, slots: Amount, layers: Amount) -> Expr:
        """Bytes of keys in `slots` slots of every head of `layers` layers."""
        return layers * B * self.K * self.D * slots * self.b

    def scores(self, rows: Amount, columns: Amount, layers: Amount) -> Expr:
        """FLOPs of scoring `rows` queries of every head of `layers` layers against `columns` keys."""
        return 2 * B * layers * self.H * self.D * rows * columns

    def values(self, decoder: Decoder) -> dict[Symbol, int]:
        fields = {
            "n": "layers",
            "E": "hidden",
            "H": "heads",
            "K": "kv_heads",
            "D": "head_dim",
            "I": "intermediate",
            "m": "mlp_matrices",
            "V": "vocab",
            "b": "itemsize",
        }
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


def pruned_forms(method: Method, drafts: bool, quantized: bool = False) -> dict[str, Expr]:
    """The target reads S tokens or C_p of them (and L), scores W (+ L) rows, keeps C slots of each KV head.

    Args: drafts: whether a draft writes the L lookahead tokens (and not the caller, or the prompt itself). quantized:
    whether the C slots are in fewer bits.
    """
    zero = sympy.Integer(0)
    ahead = L * method.futures if method.appends else zero
    compressed = zero if method.prompt is None else C_P if method.scored else C  # SpecPC keeps all that is read
    read = (compressed or S) + ahead
    heads = 1 + (L if method.appends and method.verify else 0)
    flops = _T.flops(read, read, heads) - (zero if compressed else _T.unread(read - heads))
    moved = _T.weights() + 2 * _T.kv(read) + _T.kv(C + N)
    if method.scored:
        flops += _T.scores(W + ahead, read, _T.n)
        reads_values = method.value_norms or method.reconstruction
        moved += _T.keys(read, _T.n) * (2 if reads_values else 1)  # once more, and values
        if method.reconstruction:  # what the rows read, and its products with values
            flops += 2 * _T.scores(W + ahead, read, _T.n)
    if method.share is not None:  # the mean over rows, where that is no score; and the storage is moved at the end
        if method.reduce != "mean":
            flops += _T.scores(W + ahead, read, _T.n)
            moved += _T.keys(read, _T.n)
        moved += 2 * _T.kv(C + N)
    if method.futures > 1:  # rows that score need a log-sum-exp, and all futures but the first their values anew
        flops += _T.scores(W + ahead, read, _T.n) + _T.scores(ahead - L, read, _T.n)
        moved += _T.kv(read)
    if method.writes_itself:
        flops, moved = twice_read_forms()
    held = _T.kv(C + N)
    if quantized:  # each layer as it is gathered
        held = _T.kv(N) + B * _T.n * _T.K * (C_Q * Q + F)
        moved += _T.kv(C + N) + held
    draft_flops, draft_bytes = draft_forms(method.prompt is not None, method.futures) if drafts else (zero, zero)
    if method.writes_itself:  # the target's own steps
        draft_flops, draft_bytes = ((L - 1) * form for form in (_T.flops(1, C + N, 1), _T.weights() + held))
    own = (
        int(quantized) if method.spread == "uniform" else 2
    )  # where each KV head begins, and what it holds of the prompt
    if method.spread == "global":
        moved += 2 * _T.kv(W + CANDIDATES * (C - W))
    # int64 positions and lengths, lookahead ids, and the prompt positions read with their shift
    integers = (
        _T.n * _T.K * (C + 1 + own)
        + (L * method.futures if method.drafts else zero)
        + (compressed + 1 if compressed else zero)
    )
    return {
        "prefill_flops": flops,
        "prefill_bytes": moved,
        "draft_flops": draft_flops,
        "draft_bytes": draft_bytes,
        "decode_flops": _T.flops(1, C + N, 1),
        "decode_bytes": _T.weights() + held,
        "kv_bytes": held + 8 * B * integers,
    }


def twice_read_forms() -> tuple[Expr, Expr]:
    """(FLOPs, bytes moved) of a target that writes its own lookahead: it reads S tokens, and W + L of them again.

    Both times they score, and are pruned; by the model's own forward, which computes what is behind the last layer's
    attention for all of its rows. Head: one row, and then those of the lookahead with the prompt's last one.
    """
    rows = W + L
    flops = _T.flops(S, S, 1) + _T.scores(W, S, _T.n) + _T.flops(rows, S + L, L + 1) + _T.scores(rows, S + L, _T.n)
    moved = 2 * (_T.weights() + _T.kv(C + N)) + 2 * _T.kv(S) + 3 * _T.kv(S + L)  # read, joined to the new, read again
    return flops, moved + _T.keys(S, _T.n) + _T.keys(S + L, _T.n)


def draft_forms(scores: bool, futures: int = 1) -> tuple[Expr, Expr]:
    """(FLOPs, bytes moved) of a draft's prefill and L - 1 steps over S + L slots; with `scores` n_p layers score.

    Each of several futures has a copy of the caches.
    """
    steps = L - 1
    flops = _D.flops(S, S, 1) - _D.unread(S - 1) + steps * _D.flops(futures, S + L, futures)
    moved = _D.weights() * L + 2 * _D.kv(S) + steps * futures * _D.kv(S + L)
    if futures > 1:
        moved += (futures + 1) * _D.kv(S + L)
    if scores:
        flops += _D.scores(W_P, S, N_P) + steps * _D.scores(1, S + L, N_P)
        moved += _D.keys(S, N_P) + steps * _D.keys(S + L, N_P)
    return flops, moved


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
        least = (*self.method.resolve(prompt).rungs, values[C])[0]
        whole = prompt <= least  # neither draft nor scores: see the module's docstring
        found = {}
        for name, full in self.full.items():
            kept = full if whole and name not in ("kv_bytes", "decode_flops", "decode_bytes") else self.pruned[name]
            found[name] = (round(float(full.subs(values))), round(float(kept.subs(values))))
        return found

    def answers_bytes(self, prompt: int, new_tokens: int, answers: int) -> int | None:
        """Bytes of the cache of several answers of one prompt, which share its slots; None where each has a copy.

        The C slots, their positions and their number are there once; N slots, a length and the rest for each answer.
        """
        if self.method.spread != "uniform" or Q in self.values:
            return None
        own = self.pruned["kv_bytes"] - _T.kv(C) - 8 * B * _T.n * _T.K * C
        shared = _T.kv(C) + 8 * B * _T.n * _T.K * (C + 1)
        return round(float((shared + answers * own).subs(self._values(prompt, new_tokens, 1))))

    def _values(self, prompt: int, new_tokens: int, batch: int) -> dict[Symbol, Any]:
        budgets = self.method.resolve(prompt).layer_budgets(self.layers)
        mean = sympy.Rational(sum(budgets), len(budgets))
        values = {L: self.method.look_ahead(new_tokens), **self.values}
        values[C_Q] = sympy.Rational(sum(GROUP * blocks_of(budget) for budget in budgets), len(budgets))
        room = max(room_of(new_tokens), round_room(values[L]) if self.method.verify else 0)
        return {**values, B: batch, S: prompt, C: mean, N: room, M: new_tokens}

    def held(self, prompt: int, new_tokens: int, batch: int = 1) -> int:
        """Bytes of keys and values at once while the target writes its own lookahead: the prompt's, and a pruned cache.

        0 where it does not.
        """
        if not self.method.writes_itself or prompt <= int(self.method.resolve(prompt).budget):
            return 0
        return round(float((_T.kv(S) + self.pruned["kv_bytes"]).subs(self._values(prompt, new_tokens, batch))))

    def break_even(self, what: str, new_tokens: int, batch: int = 1) -> int | None:
        """The shortest prompt from which a generation of `new_tokens` costs no more than with full KV; None: never.

        Args: what: "kv_bytes" (the cache at the end), "bytes" or "flops" (prefill, draft and all decode steps).
        A budget that is a ratio is taken as large as rounding (see Method.resolve) can make it.
        """
        values = self._values(1 << 20, new_tokens, batch)
        for name in (S, C, C_Q):
            values.pop(name)
        budget = self.method.budget
        ratio = isinstance(budget, float)
        slots = budget * S * sympy.Rational(9, 8) + BUDGET_STEP - 1 if ratio else self._values(1 << 20, 1, 1)[C]
        whole = slots + GROUP - 1 if ratio else self._values(1 << 20, 1, 1)[C_Q]
        gain = (_total(self.full, what) - _total(self.pruned, what)).subs(values).subs({C: slots, C_Q: whole})
        gain = sympy.Poly(gain, S)
        least = 1 + (int(self.method.resolve(1).budget) if ratio else int(slots))  # what fits is kept whole
        starts = [least, *(int(sympy.floor(root)) + 1 for root in gain.real_roots() if root > least)]
        return next((start for start in sorted(starts) if gain.eval(start) >= 0), None)


def _total(forms: dict[str, Expr], what: str) -> Expr:
    """One generation: prefill, draft and M - 1 decode steps (the mean step stands for each); or the cache after it."""
    if what == "kv_bytes":
        return forms["kv_bytes"].subs(S, S + M - 1)
    return forms[f"prefill_{what}"] + forms[f"draft_{what}"] + (M - 1) * forms[f"decode_{what}"]


def costs_of(method: Method, target: Decoder, draft: Decoder | None = None, bits: int = 0) -> Costs | None:
    """The costs of `method` on a target, whose cache holds prompts in so many `bits`; None where nothing is known.

    That is of methods of one's own, which may score or select in a way that costs something else.
    """
    if not is_builtin(type(method)) or method.score is not None or method.select is not None:
        return None
    drafts = method.needs_draft
    if drafts and draft is None:
        return None
    values: dict[Symbol, Any] = {**_T.values(target), W: method.window}
    if drafts and draft is not None:
        values |= _D.values(draft)
        if method.prompt is not None:
            how = method.prompt
            values |= {W_P: how.window, N_P: len(how.scoring_layers(draft.layers))}
            if method.scored:
                values[C_P] = how.budget
    if isinstance(method.lookahead, int):
        values[L] = method.lookahead
    quantized = bits > 0 and not why_unserved(target.head_dim, target.head_dim)
    if quantized:
        layout = Layout(bits, target.head_dim, target.head_dim, target.itemsize)
        values |= {Q: sympy.Rational(layout.block_bytes, GROUP), F: layout.head_bytes(0)}
    return Costs(full_forms(), pruned_forms(method, drafts, quantized), method, target.layers, values)
