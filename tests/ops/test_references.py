"""Every operator of specpass/ops, and the references of kernels, against loops that spell the formula out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import specpass.ops  # noqa: F401  (registers the operators)
from bench.fuzz import formulas
from specpass.kernels.decode import reference as decode
from specpass.kernels.gather.reference import gather_kv
from specpass.kernels.importance.reference import importance
from specpass.ops import alibi as alibi_ops
from specpass.ops import attention as attention_ops
from specpass.ops import cache as cache_ops
from specpass.ops import draft as draft_ops
from specpass.ops import rows as row_ops
from specpass.ops import select as select_ops

SEEDS = st.integers(0, 10_000)


@st.composite
def scored_heads(draw: Any) -> dict[str, Any]:
    """Query rows, keys and lengths of a packed batch; some rows shorter than the window."""
    batch, kv_heads, group, dim = (draw(st.integers(1, high)) for high in (3, 3, 3, 6))
    window, ahead = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    lengths = torch.tensor([draw(st.integers(1, 14)) for _ in range(batch)])
    columns = int(lengths.max()) + ahead
    torch.manual_seed(draw(SEEDS))
    query = 3 * torch.randn(batch, kv_heads * group, columns, dim)
    key = torch.randn(batch, kv_heads, columns, dim)
    lookahead = torch.randint(1, 6, (batch, ahead)) if ahead else None
    return {"query": query, "key": key, "lengths": lengths, "window": window, "lookahead": lookahead, "group": group}


def naive_rows(length: int, lookahead: list[int], window: int, eos: list[int]) -> list[int]:
    """The positions that score, in order: -1 in front of the prompt and behind the first EOS."""
    rows = [length + offset if length + offset >= 0 else -1 for offset in range(-window, 0)]
    ended = False
    for step, token in enumerate(lookahead):
        rows.append(-1 if ended else length + step)
        ended = ended or token in eos
    return rows


@given(scored_heads())
def test_score_rows_are_the_window_and_the_lookahead_up_to_its_first_eos(case: dict[str, Any]) -> None:
    lookahead, lengths = case["lookahead"], case["lengths"]
    for eos in ([], [2], [4, 2]):
        rows = row_ops.score_rows(lengths, lookahead, case["window"], eos)
        tokens = [[] for _ in lengths] if lookahead is None else lookahead.tolist()
        expected = [naive_rows(int(n), t, case["window"], eos) for n, t in zip(lengths, tokens, strict=True)]
        assert rows.tolist() == expected


@given(scored_heads(), st.sampled_from(["max", "mean"]), st.booleans())
def test_importance_is_the_reduced_softmax_of_full_causal_attention(
    case: dict[str, Any], reduce: str, biased: bool
) -> None:
    query, key, lengths, window = (case[name] for name in ("query", "key", "lengths", "window"))
    rows = row_ops.score_rows(lengths, case["lookahead"], window, [2])
    scale = 1 / math.sqrt(query.shape[3])
    bias = torch.randn(1, query.shape[1], key.shape[2]) if biased else None
    scores = importance(row_ops.take_rows(query, rows), key, rows, lengths, window, scale, reduce, bias=bias)
    assert scores.shape == key.shape[:3]
    assert scores.dtype == torch.float32
    wide = key.repeat_interleave(case["group"], 1).double()
    logits = query.double() @ wide.transpose(2, 3) * scale
    if bias is not None:
        logits += bias[:, :, None]
    future = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    full = logits.masked_fill(future, float("-inf")).softmax(-1)  # [B, H, T, T]: what no graph ever holds
    for row in range(len(lengths)):
        live = [r for r in rows[row].tolist() if r >= 0]
        end = max(0, int(lengths[row]) - window)
        for head in range(key.shape[1]):
            seen = full[row, head * case["group"] : (head + 1) * case["group"], live, :end].flatten(0, 1)
            expected = torch.zeros(key.shape[2])
            expected[:end] = (seen.amax(0) if reduce == "max" else seen.mean(0)).float()
            torch.testing.assert_close(scores[row, head], expected, atol=1e-6, rtol=1e-5)


def naive_select(scores: list[int], length: int, budget: int, window: int, kernel: int, pool: str) -> list[int]:
    """Scores in quarters: exact sums. Top C - W of [0, S - W), ties to the lower position, and the window."""
    end, half = max(0, length - window), kernel // 2
    around = [scores[max(0, i - half) : min(end, i + half + 1)] for i in range(end)]
    pooled = [max(part) if pool == "max" else sum(part) for part in around]
    order = sorted(range(end), key=lambda i: (-pooled[i], i))
    return sorted([*order[: budget - window], *range(max(0, length - window), length)])


@given(st.data())
def test_select_keeps_the_largest_and_the_window(data: st.DataObject) -> None:
    batch, kv_heads, window = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)))
    budget = window + data.draw(st.integers(1, 9))
    kernel, pool = data.draw(st.sampled_from([1, 3, 7])), data.draw(st.sampled_from(["max", "avg"]))
    lengths = torch.tensor([data.draw(st.integers(1, 24)) for _ in range(batch)])
    columns = int(lengths.max()) + data.draw(st.integers(0, 4))
    torch.manual_seed(data.draw(SEEDS))
    quarters = torch.randint(0, 4, (batch, kv_heads, columns))  # four values: ties everywhere
    column = torch.arange(columns)
    quarters.masked_fill_((column >= (lengths - window)[:, None])[:, None], 0)  # as importance leaves them
    positions = select_ops.select(quarters / 4, lengths, budget, window, kernel, pool)
    assert positions.shape == (batch, kv_heads, budget)
    for row in range(batch):
        for head in range(kv_heads):
            kept = positions[row, head].tolist()
            expected = naive_select(quarters[row, head].tolist(), int(lengths[row]), budget, window, kernel, pool)
            assert kept == expected + [-1] * (budget - len(expected))


def test_a_plateau_is_cut_at_its_lower_end() -> None:
    scores = torch.zeros(1, 1, 40)
    scores[..., 20] = 1.0  # max-pooled: 17 .. 23 all score 1, then zeros from position 0 on
    kept = select_ops.select(scores, torch.tensor([40]), 9, 4, 7, "max")[0, 0].tolist()
    assert kept == [17, 18, 19, 20, 21, 36, 37, 38, 39]
    kept = select_ops.select(scores, torch.tensor([40]), 13, 4, 7, "max")[0, 0].tolist()
    assert kept == [0, 1, 17, 18, 19, 20, 21, 22, 23, 36, 37, 38, 39]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 4), st.integers(1, 8))
def test_select_recent_keeps_sinks_and_tail(lengths: list[int], sinks: int, more: int) -> None:
    budget = sinks + more
    positions = select_ops.select_recent(torch.tensor(lengths), 2, budget, sinks)
    everything = select_ops.keep_all(torch.tensor(lengths), 2, budget)
    for row, length in enumerate(lengths):
        tail = range(max(sinks, length - more), length)
        expected = sorted({*range(min(sinks, length)), *tail})
        kept = [*expected, *[-1] * (budget - len(expected))]
        assert positions[row].tolist() == [kept, kept]
        slots = min(length, budget)
        assert everything[row, 1].tolist() == [*range(slots), *[-1] * (budget - slots)]


@given(st.data())
def test_gather_kv_compacts_the_kept_positions(data: st.DataObject) -> None:
    batch, kv_heads, columns, room = (data.draw(st.integers(1, high)) for high in (3, 3, 12, 4))
    budget = data.draw(st.integers(1, columns + 2))
    torch.manual_seed(data.draw(SEEDS))
    key, value = torch.randn(batch, kv_heads, columns, 4), torch.randn(batch, kv_heads, columns, 3)
    positions = torch.full((batch, kv_heads, budget), -1)
    for row in range(batch):
        for head in range(kv_heads):
            count = data.draw(st.integers(0, min(budget, columns)))
            positions[row, head, :count] = torch.randperm(columns)[:count].sort().values
    keys, values, lengths = gather_kv(key, value, positions, room)
    assert keys.shape == (batch, kv_heads * (budget + room), 4)
    assert torch.equal(lengths, (positions >= 0).sum(-1))
    for row in range(batch):
        for head in range(kv_heads):
            used, start = int(lengths[row, head]), head * (budget + room)
            for states, stored in ((key, keys), (value, values)):
                block = stored[row, start : start + budget + room]
                assert torch.equal(block[:used], states[row, head, positions[row, head, :used]])
                assert not block[used:].any()  # unused slots hold zeros, never a dropped token


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), SEEDS)
def test_fill_and_keep_kv_keep_everything(batch: int, size: int, room: int, seed: int) -> None:
    torch.manual_seed(seed)
    key, value = torch.randn(batch, 2, size, 4), torch.randn(batch, 2, size, 3)
    keys, values, lengths, positions = cache_ops.fill(key, value, torch.zeros(()), 1, room, 0, False)
    assert positions.tolist() == [[[*range(size)]] * 2] * batch
    assert torch.equal(keys.view(batch, 2, size + room, 4)[:, :, :size], key)
    assert torch.equal(values.view(batch, 2, size + room, 3)[:, :, :size], value)
    assert lengths.tolist() == [[size, size]] * batch
    real = torch.randint(1, size + 1, (batch,))
    keys, values, lengths = cache_ops.keep_kv(key, value, real, room)
    assert torch.equal(keys.view(batch, 2, size + room, 4)[:, :, :size], key)
    assert torch.equal(values.view(batch, 2, size + room, 3)[:, :, :size], value)
    assert torch.equal(lengths, real[:, None].expand(batch, 2))


@given(st.data())
def test_append_and_attend_are_plain_attention_of_each_head(data: st.DataObject) -> None:
    batch, kv_heads, group, count = (data.draw(st.integers(1, high)) for high in (3, 3, 3, 4))
    slots, dim = 12, 4
    lengths = torch.tensor([[data.draw(st.integers(0, slots - count)) for _ in range(kv_heads)] for _ in range(batch)])
    torch.manual_seed(data.draw(SEEDS))
    keys, values = (100 * torch.randn(batch, kv_heads * slots, dim) for _ in range(2))  # free slots hold garbage
    before = keys.clone(), values.clone()
    query = torch.randn(batch, kv_heads * group, count, dim)
    key, value = torch.randn(batch, kv_heads, count, dim), torch.randn(batch, kv_heads, count, dim)
    used = lengths.clone()
    decode.append_kv(keys, values, lengths, key, value)
    assert torch.equal(lengths, used + count)
    views = [states.view(batch, kv_heads, slots, dim) for states in (keys, values)]
    bias = torch.randn(batch, kv_heads * group, slots) if data.draw(st.booleans()) else None
    out = decode.attend(query, *views, lengths, 0.7, bias=bias)
    assert out.shape == query.shape
    for row in range(batch):
        for head in range(kv_heads):
            n = int(used[row, head])
            expected = []
            for old, new in zip(before, (key, value), strict=True):
                block = old.view(batch, kv_heads, slots, dim)[row, head].clone()
                block[n : n + count] = new[row, head]
                expected.append(block)
            assert torch.equal(views[0][row, head], expected[0])  # nothing else was written
            assert torch.equal(views[1][row, head], expected[1])
            for step in range(count):
                k, v = (states[: n + step + 1] for states in expected)
                q = query[row, head * group : (head + 1) * group, step]
                logits = q @ k.T * 0.7
                if bias is not None:
                    logits += bias[row, head * group : (head + 1) * group, : n + step + 1]
                plain = torch.softmax(logits, -1) @ v
                torch.testing.assert_close(
                    out[row, head * group : (head + 1) * group, step], plain, atol=2e-4, rtol=1e-4
                )


def test_a_bias_of_the_keys_in_any_dtype() -> None:
    """Over blocks of query rows, in the kernels' place, and as ONNX says it."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 300, 8), torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 6)
    bias = torch.randn(1, 4, 300)
    future = torch.ones(300, 300, dtype=torch.bool).triu(1)
    mask = bias[:, :, None].masked_fill(future, float("-inf"))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        tensors = [states.to(dtype) for states in (query, key, value)]
        wide = [states.repeat_interleave(4 // states.shape[1], 1).float() for states in tensors]
        expected = scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.3)
        for run in (attention_ops.prefill_attention, attention_ops.prefill_attention_onnx):
            out = run(*tensors, 0.3, bias=bias)
            torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
        last, keys, values = tensors[0][:, :, -2:], *tensors[1:]
        full = torch.full((2, 2), 300)
        for run in (decode.attend, attention_ops.attend_onnx):
            out = run(last, keys, values, full, 0.3, bias=bias)
            torch.testing.assert_close(out.float(), expected[:, :, -2:], atol=tolerance, rtol=tolerance)


def test_slots_behind_the_prompt_count_on_from_its_last_token() -> None:
    positions = torch.tensor([[[0, 4, 9], [3, 8, 9]], [[0, 1, -1], [0, 1, -1]]])
    found = torch.ops.specpass.slot_positions(positions, torch.zeros(2, 2, 6, 1))
    assert found.tolist() == [[[0, 4, 9, 10, 11, 12], [3, 8, 9, 10, 11, 12]], [[0, 1, 2, 3, 4, 5]] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_rounded_as_the_model_rounds_it(dtype: torch.dtype) -> None:
    """Falcon multiplies slopes of bfloat16 by positions of int64, also in float32."""
    slopes, positions = torch.tensor([0.3, 0.07]).bfloat16()[:, None], torch.arange(2000)[None, None]
    model = (slopes * positions[0]).to(dtype) / 8.0
    for run in (alibi_ops.key_bias, alibi_ops.key_bias_onnx):
        assert torch.equal(run(slopes, positions, dtype, 1 / 8)[0], model)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), SEEDS)
def test_prefill_attention_is_causal_gqa(batch: int, kv_heads: int, group: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, columns, 8)
    key, value = torch.randn(batch, kv_heads, columns, 8), torch.randn(batch, kv_heads, columns, 8)
    out = torch.ops.specpass.prefill_attention(query, key, value, 0.3)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 12), SEEDS)
def test_packing_puts_real_tokens_first_in_order_and_back(batch: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(batch, size) < 0.6
    mask[0] = torch.arange(size) >= size // 2  # left padding, as tokenizers do it
    ids = torch.randint(1, 99, (batch, size))
    order, lengths = row_ops.pack_order(mask.long(), ids)
    packed = row_ops.pack_ids(ids, order)
    for row in range(batch):
        real = ids[row][mask[row]].tolist()
        assert packed[row, : len(real)].tolist() == real
        assert int(lengths[row]) == len(real)
    hidden = packed[:, :, None].float()
    assert torch.equal(row_ops.take_positions(hidden, row_ops.unpack_index(order))[..., 0], ids.float())


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 4), SEEDS)
def test_the_lookahead_stands_right_behind_each_row(batch: int, size: int, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids, extra = torch.randint(1, 50, (batch, size)), torch.randint(50, 99, (batch, length))
    lengths = torch.randint(1, size + 1, (batch,))
    longer = row_ops.append_ids(ids, extra, lengths)
    start = torch.randint(0, 5, (batch, 1))
    positions = row_ops.append_positions(start + torch.arange(size), lengths, length)
    shared = row_ops.append_positions(torch.arange(size)[None], lengths, length)
    assert longer.shape == positions.shape == shared.shape == (batch, size + length)
    for row, n in enumerate(lengths.tolist()):
        assert longer[row, : n + length].tolist() == ids[row, :n].tolist() + extra[row].tolist()
        first = int(start[row])
        assert positions[row, : n + length].tolist() == list(range(first, first + n + length))
        assert shared[row, : n + length].tolist() == list(range(n + length))


@given(SEEDS, st.integers(1, 3), st.integers(1, 20), st.integers(1, 30), st.integers(1, 6))
def test_a_prompt_is_looked_up_row_by_row(seed: int, batch: int, size: int, length: int, vocab: int) -> None:
    """Rows of few tokens repeat themselves, at each n; what lies behind a row's end is none of it."""
    torch.manual_seed(seed)
    ids, lengths = torch.randint(0, vocab, (batch, size)), torch.randint(1, size + 1, (batch,))
    found = draft_ops.prompt_lookup(ids, lengths, length)
    for row, count in enumerate(lengths.tolist()):
        assert found[row].tolist() == formulas.looked_up(ids[row, :count].tolist(), length)


@pytest.mark.parametrize(
    ("tokens", "due"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3]),  # three tokens
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [4, 9, 2, 3, 5]),  # of three, though two were seen later
        ([*range(1, 10), 11, *range(2, 10), 12, *range(1, 10)], [12, 1, 2, 3, 4]),  # eight: the ninth does not count
        ([1, 3, 6, 1, 3, 7, 1, 3], [7, 1, 3, 7, 1]),  # the later of two places; what was copied goes on
        ([5, 7, 6, 9, 7], [6, 9, 7, 6, 9]),  # one token
        ([1, 2, 3, 4], [4, 4, 4, 4, 4]),  # none
        ([8], [8, 8, 8, 8, 8]),
    ],
)
def test_what_a_prompt_goes_on_with(tokens: list[int], due: list[int]) -> None:
    assert draft_ops.prompt_lookup(torch.tensor([tokens]), torch.tensor([len(tokens)]), 5).tolist() == [due]
    assert formulas.looked_up(tokens, 5) == due


def draw_token(
    logits: torch.Tensor,
    *,
    vocab: int = 6,
    temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    eos: tuple[int, ...] = (),
    ended: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ended = torch.zeros(logits.shape[0], dtype=torch.bool) if ended is None else ended
    return draft_ops.next_token(logits, ended, vocab, temperature, seed, step, list(eos), 9)


def test_next_token_is_the_best_of_the_smaller_vocabulary() -> None:
    logits = torch.tensor([[[9.0, 0, 0, 0, 0, 0, 0, 0], [0.0, 1, 5, 2, 0, 0, 7, 9]]])
    assert draw_token(logits)[0].tolist() == [[2]]
    assert draw_token(logits, vocab=7)[0].tolist() == [[6]]


def test_next_token_writes_the_pad_id_behind_an_eos() -> None:
    logits = torch.eye(6)[None].expand(3, -1, -1)[:, [2]]
    ids, ended = draw_token(logits, eos=(4, 2), ended=torch.tensor([False, True, False]))
    assert ids.tolist() == [[2], [9], [2]]
    assert ended.tolist() == [True, True, True]
    assert not draw_token(logits, eos=(5,))[1].any()


@given(SEEDS, st.integers(0, 30))
def test_sampling_depends_on_seed_and_step_alone(seed: int, step: int) -> None:
    torch.manual_seed(seed + 31 * step)
    logits = torch.randn(5, 1, 6)
    together = draw_token(logits, temperature=1.5, seed=seed, step=step)[0]
    alone = torch.cat([draw_token(row[None], temperature=1.5, seed=seed, step=step)[0] for row in logits])
    assert torch.equal(together, alone)
    assert torch.equal(together, draw_token(logits.flip(0), temperature=1.5, seed=seed, step=step)[0].flip(0))


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_sampling_follows_the_softmax(vary: str) -> None:
    logits, draws = torch.tensor([[[1.0, 0.0, 2.0, -1.0, 0.5, 1.5]]]), 6000
    counts = torch.zeros(6)
    for number in range(draws):
        counts[draw_token(logits, temperature=2.0, **{vary: number})[0]] += 1
    expected = (logits[0, 0] / 2.0).softmax(-1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * deviation).all(), counts / draws
