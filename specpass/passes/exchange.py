"""What the ranks of a target that is spread over processes tell each other of a prompt, as collectives in the graph."""

from __future__ import annotations

import torch
from torch import fx

from specpass.graph.edit import Editor
from specpass.parallel.shards import Ranks

COLLECTIVES = torch.ops._c10d_functional


def of_rank_0(editor: Editor, node: fx.Node, ranks: Ranks | None, before: fx.Node) -> fx.Node:
    """The first rank's tensor on all of them; the node itself without ranks.

    Drafts are whole in each process, and other cards, or kernels tuned otherwise, may round to another token.
    """
    if ranks is None:
        return node
    sent = editor.call(COLLECTIVES.broadcast, node, 0, ranks.name, before=before)
    return editor.call(COLLECTIVES.wait_tensor, sent, before=before)


def of_all_ranks(editor: Editor, node: fx.Node, ranks: Ranks, before: fx.Node, like: fx.Node | None = None) -> fx.Node:
    """[P A, ...] of the ranks' tensors [A, ...], one behind the other."""
    sent = editor.call(COLLECTIVES.all_gather_into_tensor, node, ranks.size, ranks.name, before=before, like=like)
    return editor.call(COLLECTIVES.wait_tensor, sent, before=before, like=like)
