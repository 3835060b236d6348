"""Linear layers: a library's where rows are few, in float32 where the CPU knows no better, else torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect.linear import GroupedLinear, LinearRows, LinearRows8
from specpass.kernels.cpu import wide
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear import few_rows, multiply, serves
from specpass.kernels.cpu.linear8 import multiply8, rows8
from specpass.ops.bind import bind

FEW = 32  # rows that do not pay for a weight in float32


def linear_rows(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """[..., K] -> [..., N] for each weight [N, K]: graphs with symbolic sizes also come with many rows."""
    if all(weight.dtype == input.dtype and serves(weight, bias) for weight, bias in zip(weights, biases, strict=True)):
        rows = few_rows(input.dtype)
        if not isinstance(rows, Unbuilt) and 0 < input.numel() <= rows.most * input.shape[-1]:
            return multiply(rows, input, weights, biases)
    return [linear(input, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., K] -> [..., N], in float32 where that is faster."""
    how = wide.linear if wide.is_slow(input) and input.numel() > FEW * input.shape[-1] else F.linear
    return how(input, weight, bias)


def grouped_linear(input: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[R, K] -> [R, N], by weights [E, K, N] for rows up to each of ends [E]; rows behind them, nobody's, are 0."""
    out, start = input.new_zeros(input.shape[0], weight.shape[2]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = linear(input[start:end], weight[expert].t())
        start = end
    return out


def linear_rows8(
    input: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """[..., K] -> [..., N] for each weight [N, K] in int8, with a scale [N] in float32 for each row."""
    run = rows8()
    if not isinstance(run, Unbuilt) and input.dtype == torch.bfloat16 and input.numel():
        return multiply8(run, input, weights, scales, biases)
    whole = [(weight * scale[:, None]).to(input.dtype) for weight, scale in zip(weights, scales, strict=True)]
    return [F.linear(input, weight, bias) for weight, bias in zip(whole, biases, strict=True)]


def linear_flops(input: torch.Size, weights: Sequence[torch.Size], *_: Any, **__: Any) -> int:
    """input [..., K], weights [N, K]."""
    return sum(2 * input.numel() * weight[0] for weight in weights)


def grouped_flops(input: torch.Size, weight: torch.Size, ends: torch.Size, **_: Any) -> int:
    """input [R, K], weight [E, K, N]: a row is multiplied by one expert's."""
    return 2 * input.numel() * weight[2]


bind(LinearRows, linear_rows, flops=linear_flops)
bind(GroupedLinear, grouped_linear, flops=grouped_flops)
bind(LinearRows8, linear_rows8, flops=linear_flops)
