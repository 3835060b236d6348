"""What a slot is worth where some must go: scores of a bounded layer's slots, those with the lowest go.

"attention" is what a token gets of the newest W queries: a softmax over the tokens that may go, the mean over the
queries and the most over the heads of a group, as SpecKV scores prompts with other rows.

"lookahead" is the same of W tokens that are still to come, as a draft writes them (see backend/foresee.py).

R-KV (arXiv 2505.24133, section 3.2, and its published code) keeps by Z = lambda I - (1 - lambda) R, with 0.1: "rkv".
Its importance I differs from "attention": the largest logit of a group's heads goes into the softmax, and a token
counts as the most important among seven neighbours. The redundancy R is a softmax of the mean cosine of a token's key
with every other key (without the paper's threshold, which spares the newest of tokens that are alike); "redundant" is
that alone.

"triattention" is what keys will get of queries that are still to come, by the centre about which the newest of them lie
before they are rotated (arXiv 2604.04921): formula and source are in triattention.py.

Symbols: B batch, K KV heads, G query heads of each, P slots to choose among, W newest queries, D head dimension.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.cache.triattention import future
from specpass.kernels.attention import soft_capped
from specpass.rewrite.sites import Rotation

TURNING = "triattention"  # the policy that needs to know how queries turn with their positions
FORESEEING = "lookahead"  # the policy that needs a draft
ASKING = ("attention", FORESEEING, "rkv", TURNING)  # policies that need the newest queries
POLICIES = ("recent", "attention", FORESEEING, "rkv", "redundant", TURNING, "random")
MIX = 0.1  # lambda of R-KV
POOL = 7  # neighbours of which the most important counts for all
SEED = 0  # of the random choice


@dataclasses.dataclass(frozen=True)
class Readers:
    """The query heads that read a layer: H `heads` of D `size` in `dtype`, and the soft cap of their logits."""

    heads: int
    size: int
    dtype: torch.dtype
    softcap: float = 0.0

    def room(self, window: int, like: Tensor) -> Tensor:
        """[B, H, W, D] zeros for the newest W queries of rows `like` [B, ...]."""
        room = like.new_zeros(len(like), self.heads, window, self.size, dtype=self.dtype)
        torch._dynamo.mark_static(room, (1, 2, 3))
        return room


def worth(
    policy: str,
    keys: Tensor,
    inside: Tensor,
    goes: Tensor,
    queries: Tensor | None,
    softcap: float,
    seed: int,
    rotation: Rotation | None = None,
) -> Tensor:
    """[B, K, P] float32. "recent": the order of the slots. "random": drawn, the control. The others: see above.

    Args: policy: one of POLICIES. keys [B, K, P, D]; inside [B, K, P] of slots in use; goes [B, K, P] of those that may
    go; queries [B, K * G, W, D] with the softmax's scale in them, zeros where there was none: such a row says the same
    of all slots. rotation: of the layer, for the policy that asks.
    """
    slot = torch.arange(inside.shape[-1], device=inside.device)
    if policy == "recent":
        return slot.float().expand(inside.shape)
    if policy == "random":
        generator = torch.Generator(inside.device).manual_seed(SEED + seed)
        return torch.rand(inside.shape, generator=generator, device=inside.device)
    if policy == "redundant":
        return -redundancy(keys, inside)
    assert queries is not None, "the policy asks for them"
    asked = queries.unflatten(1, (keys.shape[1], -1)).float()
    if policy == TURNING:
        assert rotation is not None, "a step's graph has told it"
        return future(keys, asked, goes, rotation)
    logits = soft_capped(torch.matmul(asked, keys.float()[:, :, None].transpose(-1, -2)), softcap)
    logits = logits.masked_fill(~goes[:, :, None, None], float("-inf"))
    if policy in ("attention", FORESEEING):
        return attention(logits)
    return MIX * importance(logits) - (1 - MIX) * redundancy(keys, inside)


def attention(logits: Tensor) -> Tensor:
    """[B, K, P] float32 of logits [B, K, G, W, P], -inf where a slot stays anyway."""
    return shares(logits).mean(3).amax(2)


def importance(logits: Tensor) -> Tensor:
    """The same of R-KV, I."""
    return F.max_pool1d(shares(logits.amax(2)).mean(2), POOL, 1, POOL // 2)


def shares(logits: Tensor) -> Tensor:
    """A softmax along the slots; zeros where nothing may go."""
    return logits.softmax(-1).nan_to_num(0.0)


def redundancy(keys: Tensor, inside: Tensor) -> Tensor:
    """[B, K, P] float32, R of R-KV; KeyDiff keeps by the same cosine (arXiv 2504.15364, equation 6)."""
    unit = F.normalize(keys.float(), dim=-1).masked_fill(~inside[..., None], 0.0)
    others = (unit * (unit.sum(2, keepdim=True) - unit)).sum(-1)  # a key of zeros is like none, nor like itself
    mean = others / inside.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~inside, float("-inf")).softmax(-1).nan_to_num(0.0)
