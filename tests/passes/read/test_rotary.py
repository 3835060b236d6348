"""read_rotation: pairs, what stays, and what is named and not guessed; models' own are in test_triattention.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import small_graph
from torch import Tensor

from specpass.graph.operands import results_of
from specpass.passes.facts import Inputs, Weights
from specpass.passes.read.rotary import hidden_nodes, read_rotation
from specpass.rewrite.sites import Rotation

OMEGA = torch.tensor([1.0, 0.1])
IDS = torch.zeros(1, 3, dtype=torch.int64)
EMBED, QUERY = torch.randn(8, 4), torch.randn(8, 4)
FOUND = Rotation((0, 2), (1, 3), (1.0, 0.1))


def turned(states: Tensor, angles: Tensor) -> Tensor:
    """Neighbours of states [B, H, q, 4] by angles [B, q, 2]."""
    even, odd = states[..., ::2], states[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def read(make: Callable[..., Tensor], key: Callable[..., Tensor] | None = None, context: int | None = None) -> Any:
    """Args: make: of projected rows [1, 2, 3, 4], positions [1, 3] and omega [2]."""

    def model(ids: Tensor, positions: Tensor, embed: Tensor, weight: Tensor, omega: Tensor) -> list[Tensor]:
        rows = torch.nn.functional.embedding(ids, embed)
        states = torch.nn.functional.linear(rows, weight).view(1, 3, 2, 4).transpose(1, 2)
        return [own(states, positions, omega) for own in (make, key or make)]

    given = (IDS, IDS, EMBED, QUERY, OMEGA)
    gm = small_graph(model, *given).gm
    nodes = gm.graph.find_nodes(op="placeholder")
    hidden = hidden_nodes(gm.graph, Inputs(nodes[0], positions=nodes[1]))
    query, new = results_of(gm.graph)
    return read_rotation(query, new, hidden, Weights(dict(zip(nodes[2:], given[2:], strict=True))), context)


def plain(states: Tensor, positions: Tensor, omega: Tensor) -> Tensor:
    return turned(states, positions[..., None].float() * omega)


def test_pairs_and_what_stays() -> None:
    assert read(plain).like(FOUND)
    halves = read(lambda x, p, w: plain(x[..., [0, 2, 1, 3]], p, w)[..., [0, 2, 1, 3]])
    assert halves.like(Rotation((0, 1), (2, 3), (1.0, 0.1)))
    part = read(lambda x, p, w: torch.cat([x[..., :2], turned(x[..., 2:], p[..., None].float() * w[1:])], -1))
    assert part.like(Rotation((2,), (3,), (0.1,)))
    assert read(lambda x, p, w: plain(x, -p, w)).like(Rotation((0, 2), (1, 3), (-1.0, -0.1)))
    assert read(lambda x, p, w: plain(torch.nn.functional.rms_norm(x, (4,)) * 3.0, p, w)).like(FOUND)
    assert read(lambda x, p, w: x) == Rotation()


def test_half_precision_is_read_in_float64() -> None:
    def cast(states: Tensor, positions: Tensor, omega: Tensor) -> Tensor:
        angles = (positions[..., None].float() * omega).to(torch.bfloat16)
        return turned(states.to(torch.bfloat16), angles)

    assert read(cast).like(FOUND)


def in_place(states: Tensor, positions: Tensor, omega: Tensor) -> Tensor:
    """A view of the projected rows is written to."""
    states[..., :2] = plain(states, positions, omega)[..., :2]
    return states


@pytest.mark.parametrize(
    ("make", "key", "text"),
    [
        (lambda x, p, w: plain(x, p, w) * (p // 4096 + 1)[:, None, :, None], None, "not in pairs"),
        (lambda x, p, w: plain(x, p, w) * torch.cat([w, w]), None, "not in pairs"),
        (lambda x, p, w: plain(x, p, w)[..., [0, 2, 3, 1]], None, "not in pairs"),
        (plain, lambda x, p, w: plain(x, p, 2 * w), "its keys do not turn as its queries do"),
        (plain, lambda x, p, w: x, "its keys do not turn as its queries do"),
        (lambda x, p, w: plain(x, torch.cumsum(p, 1), w), None, "not in pairs"),
        (lambda x, p, w: turned(x, torch.eye(2)[p]), None, "does not evaluate"),
        (in_place, None, "in place"),
        (lambda x, p, w: plain(x, p, w) / (w.sum() - w.sum()), None, "not finite"),
    ],
    ids=["scaled", "norm behind", "order", "frequencies", "keys alone", "sums", "table", "in place", "not finite"],
)
def test_what_is_named(make: Any, key: Any, text: str) -> None:
    found = read(make, key)
    assert isinstance(found, str)
    assert text in found


def test_beyond_the_context_nothing_is_tried() -> None:
    """A table of cosines ends there."""
    table = torch.arange(64)[:, None] * OMEGA
    assert read(lambda x, p, w: turned(x, table[p]), context=64).like(FOUND)
    assert "does not evaluate" in read(lambda x, p, w: turned(x, table[p]))
