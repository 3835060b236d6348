"""Choices that KV heads share, and what becomes of keys and values, against loops that spell the formula out."""

from __future__ import annotations

import pytest
import torch

import specpass
import specpass.ops
from specpass.dialect.define import SPEC
from specpass.kernels.decode import reference
from specpass.testing import eager
from specpass.testing.spread import choose

K, T, C, W, D, ROOM, AHEAD = 3, 40, 10, 4, 5, 6, 2
HOW = eager.Scoring(window=W, kernel=3)
FLOOR = int(0.2 * (C - W))


def scores_of(seed: int, lengths: torch.Tensor) -> torch.Tensor:
    """[B, K, T] with many ties, each head of its own size; 0 outside the scored columns."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 9, (len(lengths), K, T), generator=generator) * torch.tensor([0.1, 1.0, 0.3])[:, None]
    return found.masked_fill((torch.arange(T) >= (lengths - W)[:, None])[:, None], 0.0)


def pooled(scores: torch.Tensor, length: int) -> torch.Tensor:
    """[K, S - W] of one row [K, T]."""
    return eager.pooled_scores(scores[:, None, :length], length, HOW)


def used(positions: torch.Tensor) -> list[list[int]]:
    """Of one row [K, M], which are ascending, with unused slots last."""
    found = [[at for at in head if at >= 0] for head in positions.tolist()]
    assert all(head[: len(own)] == own == sorted(set(own)) for head, own in zip(positions.tolist(), found, strict=True))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_select_heads(seed: int) -> None:
    lengths = torch.tensor([T, 25, C, 7, W, 2])
    scores = scores_of(seed, lengths)
    positions = SPEC.select_heads(scores, lengths, C, W, 3, "max", FLOOR)
    assert positions.shape == (6, K, W + K * (C - W) - (K - 1) * FLOOR)
    for row, length in enumerate(lengths.tolist()):
        if length <= C:
            assert used(positions[row]) == [list(range(length))] * K
            continue
        (due,) = choose([pooled(scores[row], length)], length, C, W)
        assert used(positions[row]) == [head.tolist() for head in due]


@pytest.mark.parametrize("seed", range(4))
def test_choose_heads(seed: int) -> None:
    """Of two ranks with K heads each: what one process chooses of all of them. Each second time one takes the most."""
    lengths = torch.tensor([T, 25, C, 7, W, 2])
    every = [scores_of(seed + rank, lengths) * (1.0, (1.0, 1000.0)[seed % 2])[rank] for rank in (0, 1)]
    due = SPEC.select_heads(torch.cat(every, 1), lengths, C, W, 3, "max", FLOOR)
    most = specpass.SnapKV(budget=C, window=W).most(C, 2)
    found = [SPEC.select_candidates(own, lengths, most, W, 3, "max", FLOOR, FLOOR) for own in every]
    worth = torch.cat([worth for _, worth in found])
    chosen = [SPEC.choose_heads(positions, worth, 2 * K * C, rank) for rank, (positions, _) in enumerate(found)]
    assert [used(torch.cat(rows)) for rows in zip(*chosen, strict=True)] == [used(row) for row in due]
    most_kept = int((chosen[1] >= 0).sum((1, 2)).max())
    assert most_kept == K * most if seed % 2 else most_kept < K * most


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [0, AHEAD])
def test_share_layers(seed: int, ahead: int) -> None:
    """From candidates to one storage. No layer wants more than its candidates here."""
    layers, lengths = 3, torch.tensor([T - ahead, 25, 8])
    wide = W + layers * (C - W)
    scores = [scores_of(seed + 10 * layer, lengths) for layer in range(layers)]
    states = [[torch.rand(3, K, T, D + part) for _ in scores] for part in (0, 1)]
    index = lengths[:, None] + torch.arange(ahead)
    kept: list[list[torch.Tensor]] = [[], [], [], [], []]
    for layer, own in enumerate(scores):
        positions, worth = SPEC.select_candidates(own, lengths, wide, W, 3, "max", FLOOR, FLOOR)
        taken = SPEC.add_lookahead(positions, index) if ahead else positions
        keys, values, count = SPEC.gather_ragged(states[0][layer], states[1][layer], taken, K * (wide + ahead), 0)
        packed = (SPEC.pack_heads(each, K * wide) for each in (positions, worth))
        for into, one in zip(kept, (keys, values, count - ahead, *packed), strict=True):
            into.append(one)
    keys, values, positions, counts, starts, again = SPEC.share_layers(*kept, C, ahead, ROOM)
    assert keys.shape == (3, layers * K * (C + ROOM), D)
    assert positions.shape == (3, layers * K * C)
    for row, length in enumerate(lengths.tolist()):
        due = choose([pooled(own[row], length) for own in scores], length, C, W) if length > C else None
        begin = 0
        for layer in range(layers):
            assert counts[layer][row].tolist() == again[layer][row].tolist()
            for head, (start, count) in enumerate(zip(starts[layer][row], counts[layer][row], strict=True)):
                expected = torch.arange(length) if due is None else due[layer][head]
                assert positions[row, begin : begin + count].tolist() == expected.tolist()
                assert int(start) == begin + ROOM * (layer * K + head)
                columns = torch.cat([expected, index[row]])
                for storage, full in zip((keys, values), states, strict=True):
                    assert torch.equal(storage[row, start : start + len(columns)], full[layer][row, head, columns])
                begin += int(count)
        assert (positions[row, begin:] == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_ranks_choose_what_one_process_chooses(seed: int) -> None:
    """Each of two has K of the heads of every layer, its own candidates and the worth of all."""
    layers, lengths = 3, torch.tensor([T, 25, 8])
    wide = W + 2 * layers * (C - W)
    scores = [
        torch.cat([scores_of(seed + 10 * layer + part, lengths) for part in (0, 1)], 1) for layer in range(layers)
    ]
    found: list[list[list[torch.Tensor]]] = [[[], [], [], [], []] for _ in range(2)]
    for own in scores:
        for part, into in zip(own.split(K, 1), found, strict=True):
            positions, worth = SPEC.select_candidates(part, lengths, wide, W, 3, "max", FLOOR, FLOOR)
            states = SPEC.gather_ragged(torch.rand(3, K, T, D), torch.rand(3, K, T, D), positions, K * wide, 0)
            packed = (SPEC.pack_heads(each, K * wide) for each in (positions, worth))
            for kept, one in zip(into, (*states, *packed), strict=True):
                kept.append(one)
    worth = torch.stack([one for into in found for one in into[4]])
    for rank, (keys, values, counts, positions, _) in enumerate(found):
        chosen = SPEC.choose_shared(positions, worth, layers * 2 * K * C, rank)
        packed, counts = SPEC.share_layers(keys, values, counts, chosen, [], wide, 0, ROOM)[2:4]
        for row, length in enumerate(lengths.tolist()):
            due = choose([pooled(own[row], length) for own in scores], length, C, W) if length > C else None
            mine = [
                torch.arange(length) if due is None else due[layer][rank * K + head]
                for layer in range(layers)
                for head in range(K)
            ]
            assert torch.cat([each[row] for each in counts]).tolist() == list(map(len, mine))
            flat = torch.cat(mine)
            assert packed[row, : len(flat)].tolist() == flat.tolist()


def test_a_layer_has_no_more_than_its_candidates() -> None:
    lengths, wide = torch.tensor([T]), W + 2 * (C - W)
    kept: list[list[torch.Tensor]] = [[], [], [], [], []]
    for factor in (100.0, 1.0, 1.0):
        positions, worth = SPEC.select_candidates(
            factor * scores_of(1, lengths), lengths, wide, W, 3, "max", FLOOR, FLOOR
        )
        states = (torch.rand(1, K, T, D) for _ in range(2))
        packed = (SPEC.pack_heads(each, K * wide) for each in (positions, worth))
        for into, one in zip(kept, (*SPEC.gather_ragged(*states, positions, K * wide, 0), *packed), strict=True):
            into.append(one)
    counts = [int(own.sum()) for own in SPEC.share_layers(*kept, C, 0, ROOM)[3]]
    assert counts[0] == K * wide
    assert sum(counts) == 3 * K * C


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("changes", [(0.0, False, 0, 0), (2.0, True, 3, 0), (0.0, False, 0, 4)])
def test_attention_of_a_head_is_that_over_its_own_slots(count: int, changes: tuple[float, bool, int, int]) -> None:
    """Read by lengths, or masked where lengths are on a device."""
    generator = torch.Generator().manual_seed(count)
    keys, values = (torch.randn(2, 50, width, generator=generator) for width in (D, D + 1))
    query = torch.randn(2, 2 * K, count, D, generator=generator)
    lengths, offsets = torch.tensor([[5, 12, 3], [20, 4, 9]]), torch.tensor([[4, 20, 40], [29, 0, 12]])
    how = (0.3, changes[0], torch.randn(2 * K, generator=generator) if changes[1] else None, *changes[2:])
    found = SPEC.attend(query, keys, values, lengths, *how, None, offsets)
    masked = reference.attend_masked(query, keys, values, lengths, offsets, *how)
    for row, head in ((row, head) for row in range(2) for head in range(K)):
        own = slice(int(offsets[row, head]), int(offsets[row, head] + lengths[row, head]))
        some = slice(2 * head, 2 * head + 2)
        states = (each[row, own][None, None] for each in (keys, values))
        sinks = None if how[2] is None else how[2][some]
        of_head = (lengths[[row], head : head + 1], how[0], how[1], sinks, *how[3:])
        due = reference.attend(query[[row], some], *states, *of_head)[0]
        torch.testing.assert_close(found[row, some], due)
        torch.testing.assert_close(masked[row, some], due)
