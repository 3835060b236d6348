"""Linear layers of few rows, as lowered steps say them."""

from __future__ import annotations

from torch import fx

from specpass.dialect.define import Operator


class LinearRows(
    Operator, schema="linear_rows(Tensor input, Tensor[] weights, Tensor?[] biases) -> Tensor[]", since="LOWERED"
):
    """linear(input, weight, bias) [..., N] of each weight [N, K], for an input [..., K] of few rows; biases [N]."""

    input: fx.Node
    weights: list[fx.Node]
    biases: list[fx.Node | None]

    @staticmethod
    def fake(input, weights, biases):
        return [input.new_empty(*input.shape[:-1], weight.shape[0]) for weight in weights]


class LinearRows8(
    Operator, schema="linear_rows8(Tensor input, Tensor[] weights, Tensor[] scales, Tensor?[] biases) -> Tensor[]"
):
    """The same of weights [N, K] in int8, each of whose rows is multiplied by its scale [N] in float32."""

    input: fx.Node
    weights: list[fx.Node]
    scales: list[fx.Node]
    biases: list[fx.Node | None]

    @staticmethod
    def fake(input, weights, scales, biases):
        return LinearRows.fake(input, weights, biases)
