"""ALiBi as models spell it: slopes [H] times positions, cast, reshaped and scaled, inside of an additive mask.

Read by structure: a product of a number for each head, which depends on no input, with integers. Whether these are the
keys' positions, and the rest of the mask is a mask, is found by evaluating it (masks.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.graph.aten import Add, Factor, MaskedFill, Passive, SameNumbers, Where
from specpass.graph.walk import ancestors, behind, value
from specpass.rewrite.sites import Alibi

FOLLOWING = (Passive, SameNumbers, MaskedFill, Where, Add)  # what may come behind the product, beside factors


def read_alibi(mask: fx.Node, heads: int) -> Alibi | None:
    """The bias of keys in a mask of `heads` heads, None where there is none of this form."""
    needed = ancestors(mask)
    for node in needed:
        product = Factor.match(node)
        if product is None or not Factor.multiplies(node):
            continue
        for slopes, positions in ((product.input, product.other), (product.other, product.input)):
            if is_slopes(slopes, heads) and is_integer(positions):
                factor = factor_behind(node, needed)
                return None if factor is None else Alibi(slopes, value(mask).dtype, factor)
    return None


def is_slopes(node: object, heads: int) -> bool:
    """Whether it is one float for each head, along one axis, made of nothing that a call brings."""
    val = value(node)
    if not isinstance(node, fx.Node) or not isinstance(val, Tensor) or not val.is_floating_point():
        return False
    if not all(isinstance(size, int) for size in val.shape) or val.numel() != heads or heads not in val.shape:
        return False
    return all(source.op != "placeholder" for source in ancestors(node))


def is_integer(node: object) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and not val.is_floating_point() and val.dtype != torch.bool


def factor_behind(product: fx.Node, needed: list[fx.Node]) -> float | None:
    """By what the product is multiplied on its way to the last of `needed`; None where an operator is not known."""
    number, followed = 1.0, behind(product)
    for node in needed:
        if node not in followed:
            continue
        scaled = Factor.match(node)
        if scaled is not None and isinstance(scaled.other, (int, float)):
            number *= scaled.other if Factor.multiplies(node) else 1.0 / scaled.other
        elif not any(view.is_call(node) for view in FOLLOWING):
            return None
    return number


def adds(alibi: Alibi, slopes: Tensor, mask: Tensor, position: Tensor, read: Tensor) -> bool:
    """Whether a mask [B, H, S, S] adds this bias where `read` [B, 1, S, S], but for a constant of each row.

    Args: position [B, S] of the keys.
    """
    bias = SPEC.key_bias(slopes, position[:, None], alibi.dtype, alibi.factor)[:, :, None].double()
    rest = (mask.double() - bias).masked_fill(~read, 0)
    own = torch.diagonal(rest, dim1=2, dim2=3)[..., None]  # what a row that reads anything adds to its own key
    largest = float(bias.abs().max())
    off = (rest - own).masked_fill(~read, 0)
    return bool((off.abs() <= 8 * torch.finfo(alibi.dtype).eps * largest).all())
