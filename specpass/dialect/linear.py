"""Linear layers, as lowered graphs say them."""

from __future__ import annotations

from torch import fx

from specpass.dialect.define import Operator


class LinearRows(
    Operator, schema="linear_rows(Tensor input, Tensor[] weights, Tensor?[] biases) -> Tensor[]", since="LOWERED"
):
    """linear(input, weight, bias) [..., N] of each weight [N, K], for one input [..., K]; biases [N]."""

    input: fx.Node
    weights: list[fx.Node]
    biases: list[fx.Node | None]

    @staticmethod
    def fake(input, weights, biases):
        return [input.new_empty(*input.shape[:-1], weight.shape[0]) for weight in weights]


class GroupedLinear(
    Operator, schema="grouped_linear(Tensor input, Tensor weight, Tensor ends) -> Tensor", since="LOWERED"
):
    """[R, N]: each row of input [R, K] times its expert's weight of [E, K, N]; ends [E]: where an expert's rows end."""

    input: fx.Node
    weight: fx.Node
    ends: fx.Node

    @staticmethod
    def fake(input, weight, ends):
        return input.new_empty(input.shape[0], weight.shape[2])


class LinearRows8(
    Operator, schema="linear_rows8(Tensor input, Tensor[] weights, Tensor[] scales, Tensor?[] biases) -> Tensor[]"
):
    """linear_rows of weights [N, K] in int8, each of whose rows is multiplied by its scale [N] in float32."""

    input: fx.Node
    weights: list[fx.Node]
    scales: list[fx.Node]
    biases: list[fx.Node | None]

    @staticmethod
    def fake(input, weights, scales, biases):
        return LinearRows.fake(input, weights, biases)
