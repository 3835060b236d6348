"""What a model does to attention logits that pruned attention does not, as caps or sinks in another spelling.

Found by walking from a softmax that `read/attention.py` could not read back to the product with the cached keys. Such
models run exactly, and this says why.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx

from specpass.graph.walk import ATEN, is_op

PRODUCTS = (ATEN.matmul, ATEN.bmm, ATEN.baddbmm, ATEN.einsum)
OTHERS = (ATEN.linear, ATEN.scaled_dot_product_attention)  # a router's softmax is no attention
CHANGES = (
    (ATEN.tanh, "attention logits are capped (tanh)"),
    (ATEN.cat, "attention sinks: columns that are no keys join the logits"),
)
STEPS = 40  # between a softmax and its product, and between that and the keys, stand fewer nodes


def changed_logits(softmax: fx.Node, keys: Container[fx.Node]) -> str | None:
    """Why this softmax over cached `keys` is no plain attention; None where it reads none of them."""
    path = walk_back(softmax, (*PRODUCTS, *OTHERS))
    products = [node for node in path if is_op(node, *PRODUCTS)]
    if not any(node in keys for product in products for node in walk_back(product, ())):
        return None
    for packet, reason in CHANGES:
        if any(is_op(node, packet) for node in path):
            return reason
    return "attention logits are changed in a way that is not recognised"


def walk_back(start: fx.Node, stop: tuple[Any, ...]) -> list[fx.Node]:
    """Nodes that `start` is made of, nearest first, not looking behind operators of `stop`."""
    found: dict[fx.Node, None] = {}
    frontier = list(start.all_input_nodes)
    while frontier and len(found) < STEPS:
        node = frontier.pop(0)
        if node not in found:
            found[node] = None
            if not is_op(node, *stop):
                frontier += node.all_input_nodes
    return list(found)
