"""The operators as graphs see them: schemas, fake kernels, and the references behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specpass.dialect import OPERATORS
from specpass.kernels.cpu.linear8 import quantized
from specpass.ops import IMPLEMENTATIONS

SPEC = torch.ops.specpass
B, H, K, S, D, C, N, W, L = 2, 4, 2, 9, 8, 5, 3, 2, 2
CHECKS = ("test_schema", "test_faketensor")


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator; several tuples where an argument changes the shapes."""
    torch.manual_seed(0)
    # [B, T, heads, D] seen as [B, heads, T, D]: how models hand them over
    query, key, value = (torch.randn(B, S + L, *sizes).transpose(1, 2) for sizes in ((H, D), (K, D), (K, D + 1)))
    ids = torch.randint(1, 50, (B, S))
    ahead = torch.randint(1, 50, (B, L))
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, :3] = 0
    order, lengths = SPEC.pack_order(mask, ids)
    rows = SPEC.score_rows(lengths, ahead, W, [7])
    scores = torch.rand(B, K, S + L)
    positions = SPEC.select(scores, lengths, C, W, 3, "max")
    keys, values, used = SPEC.gather_kv(key, value, positions, N)
    heads = [states.view(B, K, C + N, -1) for states in (keys, values)]
    sinks = torch.randn(H)
    options: tuple[Any, ...] = ((), (2.0, sinks), (0.0, None, 3, 0), (2.0, sinks, 0, 4))
    biases = torch.randn(1, H, S + L), torch.randn(B, H, C + N)
    linear = torch.randn(B, 1, 64), torch.randn(48, 64), torch.randn(48)
    linears = linear, tuple(tensor.bfloat16() for tensor in linear)
    handle, step = torch.zeros((), dtype=torch.int64), (torch.randn(B, K, 2, D), torch.randn(B, K, 2, D + 1))
    some, worth = SPEC.select_candidates(scores, lengths, C, W, 3, "max", 1, 1)
    ragged, flat = SPEC.gather_ragged(key, value, SPEC.add_lookahead(some, lengths[:, None]), K * (C + 1), N), K * C
    begins, counts = SPEC.head_offsets(ragged[2] - 1, N + 1)
    each = [2 * [item] for item in (*SPEC.gather_ragged(key, value, some, flat, 0), SPEC.pack_heads(some, flat))]
    branches = torch.cat([ahead, ahead.flip(1)], 1)
    worths = 2 * [SPEC.pack_heads(worth, flat)]
    return {
        "weigh_values": [(scores, value)],
        "reconstruction": [
            (query[:, :, : W + L], key, value, rows, lengths, W, 0.3, "max"),
            (query[:, :, : W + L], key, value, rows, lengths, W, 0.3, "mean", 1, 2.0, sinks, biases[0]),
        ],
        "select_candidates": [(scores, lengths, C, W, 3, "max", 1, 1), (scores, lengths, S + 4, W, 7, "avg", 2, 0)],
        "select_rungs": [
            (scores, scores / 9, lengths, C, W, 3, "max", [C - 2, C]),
            (scores, scores / 9, lengths, S + 4, W, 7, "avg", [S + 4]),
        ],
        "kept_shares": [(positions, [C - 2, C])],
        "select_heads": [(scores, lengths, C, W, 3, "max", 1), (scores, lengths, S + 4, W, 7, "avg", 2)],
        "pack_heads": [(some, flat), (worth, flat + 3)],
        "choose_shared": [(each[3], torch.stack([*worths, *worths[::-1]]), 4 * K * (C - 1), rank) for rank in (0, 1)],
        "choose_heads": [(some, torch.cat([worth, worth.flip(1)]), 2 * K * (C - 1), rank) for rank in (0, 1)],
        "gather_ragged": [(key, value, some, flat, N)],
        "head_offsets": [(counts, N)],
        "show_heads": [(ragged[0], begins, C + N)],
        "share_layers": [(*each, scored, C - 1 if scored else C, 0, N) for scored in ([], worths)],
        "fill": [(key, value, handle, C, N, 0, False), (key, value, handle, S + L + 1, N, 0, True)],
        "lookahead": [(key, None, L), (key, ahead, L)],
        "size": [(key, 2)],
        "extend_kv": [(*heads, *step)],
        "append_kv": [
            (keys, values, used, *step, handle),
            (keys, values, used, *step, None),
            (keys, values, used, *step, handle, positions),
            (*ragged[:2], counts, *step, None, None, begins),
        ],
        "quantize_kv": [
            (torch.randn(B, K * (C + N), 16), torch.randn(B, K * (C + N), 8), torch.full((B, K), C), C, N, bits)
            for bits in (8, 4, 2)
        ],
        "key_columns": [(key,)],
        "slot_positions": [(positions, heads[0])],
        "key_bias": [
            (torch.rand(H, 1), torch.arange(S)[None, None], torch.float32, 0.5),
            (torch.rand(H).bfloat16(), positions, torch.float32, 1.0),
        ],
        "note_queries": [
            (torch.randn(B, H, W, D), torch.randn(B, H, 3, D), 0.5),
            (torch.randn(B, H, W, D), torch.randn(B, H, 3, D), 0.5, torch.tensor([0, 2])),
        ],
        "take_back": [(used, torch.tensor([0, 2]))],
        "pack_order": [(mask, ids)],
        "pack_appended": [(mask, ids), (mask, ids[:, :2]), (mask, torch.randn(B, 3, D))],
        "full_lengths": [(ids,)],
        "pack_ids": [(ids, order)],
        "append_ids": [(ids, ahead, lengths)],
        "ahead_index": [(lengths, L)],
        "add_lookahead": [(positions, lengths[:, None] + torch.arange(L))],
        "append_positions": [(order, lengths, L), (order[:1], lengths, L), (order, lengths, L, 2)],
        "expand_rows": [(ids[:1], ids), (ids, ids)],
        "row_index": [(ids,)],
        "unpack_index": [(order,)],
        "take_positions": [(torch.randn(B, S, D), lengths[:, None] - 1)],
        "score_rows": [(lengths, ahead, W, [7]), (lengths, None, W, []), (lengths, branches, W, [7], 2)],
        "take_rows": [(query, rows)],
        "importance": [(SPEC.take_rows(query, rows), key, rows, lengths, W, 0.3, how) for how in ("max", "mean")]
        + [
            (SPEC.take_rows(query, rows), key, rows, lengths, 0, 0.3, "sum", torch.rand(W + L), lse)
            for lse in (None, torch.rand(B, H, W + L))
        ]
        + [
            (SPEC.take_rows(query, rows), key, rows, lengths, W, 0.3, "max", None, None, *last)
            for last in ((2.0, sinks), (0.0, None, biases[0]))
        ],
        "select": [(scores, lengths, C, W, 3, "max"), (scores, lengths, S + 4, W, 7, "avg")],
        "select_recent": [(lengths, K, C, 1), (lengths, K, S + 4, 0)],
        "select_chunk": [(lengths, K, 4), (lengths, K, S + 4)],
        "keep_all": [(lengths, K, S + 4)],
        "gather_kv": [(key, value, positions, N)],
        "keep_kv": [(key, value, lengths, N)],
        "attend": [
            (query[:, :, :q], *heads, used, 0.3, *last)
            for q in (1, 3)
            for last in (*options, (0.0, None, 0, 0, biases[1]))
        ]
        + [
            (query[:, :, :q], *ragged[:2], counts, 0.3, *last, None, begins)
            for q in (1, 2)
            for last in ((0.0, None, 0, 0), (2.0, sinks, 3, 0))
        ],
        "attend_cascade": [
            (
                query[:, :, :2].repeat(3, 1, 1, 1),
                *(states.repeat(3, 1, 1, 1) for states in heads),
                own,
                prompt,
                0.3,
                *last,
            )
            for own in (used.repeat(3, 1),)
            for prompt, last in [*(([*heads, used], last) for last in options), ([*ragged[:2], counts, begins], ())]
        ],
        "prefill_attention": [(query, key, value, 0.3), (query[:, :K], key, value, 0.3)]
        + [(query, key, states, 0.3, softcap, sinks) for softcap in (0.0, 2.0) for states in (key, value)]
        + [(query, key, value, 0.3, *last) for last in ((0.0, None, 3, 0), (2.0, sinks, 0, 4))]
        + [(query, key, value, 0.3, *last) for last in ((0.0, None, 0, 0, biases[0]), (2.0, sinks, 3, 0, biases[0]))],
        "modified_attention": [
            (query, key, value, mask, 0.3, 2.0, some)
            for some in (sinks, None)
            for mask in (None, torch.zeros(B, 1, S + L, S + L))
        ],
        "prefill_attention_lse": [(states, key, key, rows, 0.3) for states in (query, query[:, :K])],
        "prefill_attention_sparse": [(query, key, value, positions, lengths, 0.3, W, L, C)],
        "append_attend": [
            (keys, values, used, query[:, :, :1], *(states[:, :, :1] for states in step), 0.3, *last)
            for last in ((), (2.0, sinks))
        ]
        + [
            (*ragged[:2], counts, query[:, :, :1], *(states[:, :, :1] for states in step), 0.3, 0.0, None, 0, 0, begins)
        ],
        "append_attend_lse": [(keys, values, used, query[:, :, :1], *(states[:, :, :1] for states in step), 0.3)],
        "linear_rows": [(x, [weight, weight[:20]], [bias, None]) for x, weight, bias in linears],
        "linear_rows8": [
            (x, [numbers, numbers[:20]], [scale, scale[:20]], [bias, None])
            for x, weight, bias in linears
            for numbers, scale in [quantized(weight)]
        ],
        "grouped_linear": [
            (
                x.flatten(0, -2),
                torch.stack([weight, weight]).transpose(1, 2),
                torch.tensor([1, x.flatten(0, -2).shape[0]]),
            )
            for x, weight, _ in linears
        ],
        "read_prompt": [(key,), (key, scores[:, 0, :S])],
        "widen": [(keys, K, C + N), (keys, K, C + N + 3)],
        "advance": [(torch.tensor(5), None, 2), (torch.tensor(5), lengths, 2)],
        "told_positions": [(order, lengths), (order[:1], lengths)],
        "told_length": [(torch.tensor(5), lengths)],
        "row_weights": [(lengths, W), (lengths, 1)],
        "no_scores": [(ids, 1), (keys, K)],
        "merge_layer": [(scores[:, 0], scores, how) for how in ("max", "sum")],
        "merge_step": [(scores[:, 0, :S], scores[:, 0], how) for how in ("max", "sum")],
        "select_prompt": [(scores[:, 0], lengths, C, W, 4, 3, "max"), (scores[:, 0], lengths, S + 9, W, 3, 2, "avg")],
        "take_ids": [(ids, positions[:, 0])],
        "count_kept": [(positions[:, 0],)],
        "number_anew": [(positions[:, 0],)],
        "map_positions": [(positions, order)],
        "keep_short_rows": [(positions, lengths, C), (positions, lengths, C + 3)],
        "attend_branches": [
            (SPEC.prefill_attention(*long, 0.3), *long, lengths, W, L, 2, 0.3, *last)
            for long in ([states.repeat(1, 1, 2, 1) for states in (query, key, value)],)
            for last in options
        ],
        "next_tokens": [(torch.randn(2 * B, 1, 50), torch.tensor([False, True] * B), 2, 40, [7], 0)],
        "prompt_lookup": [(ids, lengths, L), (ids, lengths, S + 4)],
        "next_token": [
            (torch.randn(B, 1, 50), torch.tensor([False, True]), 40, heat, 1, 2, [7], 0) for heat in (0.0, 1.0)
        ],
    }


SAMPLES = samples()


def test_every_operator_is_bound_and_has_a_sample() -> None:
    assert set(OPERATORS) == set(IMPLEMENTATIONS) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """The schema tells the truth about aliasing and mutation; the fake kernel about shapes, strides and types."""
    operator = getattr(SPEC, name).default
    for args in SAMPLES[name]:
        result = torch.library.opcheck(operator, args, test_utils=CHECKS)
        assert result == dict.fromkeys(CHECKS, "SUCCESS")


@pytest.mark.parametrize("name", SAMPLES)
def test_schemas_take_plain_values_alone(name: str) -> None:
    plain = {
        "Tensor",
        "Optional[Tensor]",
        "int",
        "float",
        "bool",
        "str",
        "List[int]",
        "List[Tensor]",
        "List[Optional[Tensor]]",
        "Optional[List[Tensor]]",
    }
    for argument in getattr(SPEC, name).default._schema.arguments:
        assert str(argument.type) in plain, argument
