"""What the passes of a target and of a draft tell each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor, fx

from specpass.sizes import Span


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The prompt's inputs [B, S] by role; packed ones once the rows are packed.

    `embeds` [B, S, E]: given in the ids' place.
    """

    ids: fx.Node | None
    mask: fx.Node | None = None
    positions: fx.Node | None = None
    embeds: fx.Node | None = None

    @classmethod
    def of(cls, named: Mapping[str, fx.Node]) -> Inputs:
        """From nodes by the roles of specpass.graph.roles."""
        roles = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        return cls(*(named.get(role) for role in roles))

    @property
    def tokens(self) -> fx.Node:
        """The ids [B, S], or the embeddings [B, S, E] in their place."""
        tokens = self.embeds if self.ids is None else self.ids
        assert tokens is not None
        return tokens


@dataclasses.dataclass(frozen=True)
class Spans:
    """What each of the cache's layers is taken to read: by the config (a prompt), or as its prefill found (later)."""

    layers: tuple[Span | None, ...]


@dataclasses.dataclass(frozen=True)
class RotationAsked:
    """Evictions ask how queries turn with their positions. `context`: positions that the model was made for."""

    context: int | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """The model's real tensors by placeholder: experts are tried on a few rows."""

    tensors: Mapping[fx.Node, Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows: row b's tokens stand at 0 .. lengths[b] - 1.

    Args:
        lengths: [B], of the tokens that the target reads.
        order: [B, S] packed column -> the caller's, None without a padding mask.
        full: every row's last token stands in the last column.
    """

    lengths: fx.Node
    order: fx.Node | None = None
    full: bool = False


@dataclasses.dataclass(frozen=True)
class Drafted:
    """The draft stands in front of the target.

    Args:
        ids: [B, L] lookahead tokens, which the answer may follow.
        anchor: the target's first own node.
        scores: [B, S] the draft's attention to each prompt token, where it scores.
        lifted: the draft's tensors by the name of their placeholder.
        futures: [B, M L] those of all M branches, side by side, the first of which is `ids`; None: there is no other.
        caches: of each of its layers keys, values [B, K * P, D] and lengths [B, K], behind L - 1 of its tokens.
    """

    ids: fx.Node
    anchor: fx.Node
    scores: fx.Node | None = None
    lifted: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    caches: tuple[fx.Node, ...] = ()
    futures: fx.Node | None = None

    @property
    def read(self) -> fx.Node:
        """[B, M L]: all tokens that the target reads behind the prompt."""
        return self.ids if self.futures is None else self.futures


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Verified lookahead: the graph's last result are the logits [B, L, V] behind each of `tokens` = L tokens.

    `why`: the reason where there is none (tokens 0).
    """

    tokens: int = 0
    why: str = ""


@dataclasses.dataclass(frozen=True)
class ReadPositions:
    """positions: [B, C] prompt tokens that the target reads (SpecPC), ascending, -1 unused."""

    positions: fx.Node


@dataclasses.dataclass(frozen=True)
class Branches:
    """[B, H, W + M L] float32 of each attention site: the log-sum-exp of the rows that score."""

    lse: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Attention:
    """[B, K, T] float32 of each attention site that is scored: the mean probability of its columns, where a budget is
    chosen by it."""

    nodes: tuple[fx.Node | None, ...]


@dataclasses.dataclass(frozen=True)
class Scores:
    """[B, K, T] float32 of each attention site, in their order; None where a site keeps what it reads."""

    nodes: tuple[fx.Node | None, ...]
