"""What a key is worth to queries that are still to come: TriAttention (arXiv 2604.04921, and its published code).

Before they are rotated, a head's queries lie about a centre, one complex number q_f for each pair f of dimensions that
turns by w_f radians a position. Their expected logit with a key that was k_f before it was rotated, at a distance d, is
a trigonometric series in d; where the queries lie apart (R_f, the length of their mean over their mean length, is
small), the key's size counts besides:

    S(k, d) = sum_f |q_f| |k_f| cos(w_f d + arg q_f - arg k_f)  +  sum_f (1 - R_f) E|q_f| |k_f|

with R_f = |q_f| / E|q_f|. A key's score is the mean over queries 1, 2, 4, ... 65,536 positions further on than the next
token. Scores of a head are standardised over the slots that may go; a slot counts as what it is worth to the head of
its group that wants it most.

The paper takes centres from a calibration beforehand; here they are the mean of the newest W queries, of which this
policy notes four times as many as others do: the mean of 16 told keys apart hardly better than chance (SmolLM2-135M,
600 tokens in 64 slots), that of 64 better. They are rotated, and so are the keys, but only where they stand in
relation to each other counts: the newest W tokens stand side by side in front of the next one, so that turning each
back to the next token's place leaves Q_f = q_f exp(i w_f p), where p is that place, and

    |q_f| |k_f| cos(w_f (d + o) + arg q_f - arg k_f) = Re(Q_f exp(i w_f o) conj(K_f)),   d = p - position of the key

for keys K_f as they are stored. The mean over the offsets o is one number for each frequency, and a head's scores are
one product with its keys. Dimensions that do not turn add q . k. Rows of zeros, where there was no query, change the
scores of a head by one factor, which standardising takes away. Soft caps are left out: what is scored is no logit of
one query, and within a head a cap changes no order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from specpass.rewrite.sites import Rotation

OFFSETS = tuple(2**power for power in range(17))  # positions behind the next token's
LEAST = 1e-6  # standard deviation of a head's scores


@functools.lru_cache(maxsize=64)
def turns(rotation: Rotation, size: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a head of `size` D is scored with, on the device: made once, so that no eviction waits for a copy.

    Returns: dims [D] int64: those of `first`, of `second`, and the others. ahead [W, F] complex64: by what the newest W
    queries turn to the next token's place. further [F] complex64: the mean turn over OFFSETS.
    """
    turning = (*rotation.first, *rotation.second)
    dims = torch.tensor([*turning, *(dim for dim in range(size) if dim not in turning)], dtype=torch.int64)
    omega = torch.tensor(rotation.omega, dtype=torch.float64)  # angles of 65,536 radians and more, in float64
    ahead, further = (
        torch.polar(torch.ones_like(angles), angles)
        for angles in (
            torch.arange(window, 0, -1, dtype=torch.float64)[:, None] * omega,
            torch.tensor(OFFSETS, dtype=torch.float64)[:, None] * omega,
        )
    )
    return dims.to(device), ahead.to(device, torch.complex64), further.mean(0).to(device, torch.complex64)


def series(keys: Tensor, queries: Tensor, rotation: Rotation) -> Tensor:
    """[B, K, G, P] float32: S of each head and slot, the mean over OFFSETS.

    Args: keys [B, K, P, D] as they are stored; queries [B, K, G, W, D] float32 of the newest tokens, in order.
    """
    dims, ahead, further = turns(rotation, keys.shape[-1], queries.shape[-2], keys.device)
    pairs = len(further)
    stored, asked = keys.float()[..., dims], queries[..., dims]
    turned = torch.complex(asked[..., :pairs], asked[..., pairs : 2 * pairs])
    centre = (turned * ahead).mean(-2)
    spread = turned.abs().mean(-2) - centre.abs()  # (1 - R_f) E|q_f|
    far = centre * further
    direction = torch.cat([far.real, far.imag, asked[..., 2 * pairs :].mean(-2)], -1)
    lengths = torch.hypot(stored[..., :pairs], stored[..., pairs : 2 * pairs])
    return direction @ stored.transpose(-1, -2) + spread @ lengths.transpose(-1, -2)


def future(keys: Tensor, queries: Tensor, goes: Tensor, rotation: Rotation) -> Tensor:
    """[B, K, P] float32 of the slots' keys, see `series`; goes [B, K, P]: those that may go, by which it is scaled."""
    among = goes[:, :, None]
    scores = series(keys, queries, rotation).masked_fill(~among, 0.0)
    count = among.sum(-1, keepdim=True).clamp(min=1)
    off = scores - scores.sum(-1, keepdim=True) / count
    deviation = ((off.square() * among).sum(-1, keepdim=True) / count).sqrt()
    return (off / deviation.clamp(min=LEAST)).amax(2)
