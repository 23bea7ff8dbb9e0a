"""Matrix products with weights of few bits. No float copy of a whole weight is made."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.ops.activations import Activations
from engine.ops.dispatch import body
from engine.ops.grouped import GroupedWeight


def empty_grouped(
    out_features: int, in_features: int, bits: int, group_size: int, has_zeros: bool, empty: Callable[..., Tensor]
) -> GroupedWeight:
    """The memory, taken by empty(*shape, dtype=), of a weight of 4 or 8 bits in groups of inputs; without zeros they
    are 0. `grouped_linear` knows it as it comes out of `empty`, whatever was there."""
    assert in_features % group_size == in_features % 2 == 0, (in_features, group_size)
    return body(empty(0)).empty_grouped(out_features, in_features, bits, group_size, has_zeros, empty)


def put_grouped(weight: GroupedWeight, first_row: int, numbers: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """Fill the rows from `first_row` on. Several threads may, each other rows.

    numbers [rows, in] int8 of the weight's bits, scales [rows, groups] of any float, zeros [rows, groups] int16, all on
    any device.
    """
    body(weight.packed).put_grouped(weight, first_row, numbers, scales, zeros)


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias, W rounded to x's type or not at all.   x [rows, in], bias [out], result [rows, out]"""
    return body(x).grouped_linear(x, weight, bias)


def grouped_gated_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, kind: str) -> Tensor:
    """As gated_linear; W [2 · dim, in], result [rows, dim]."""
    return body(x).grouped_gated_linear(x, weight, bias, kind)


def rounded_linear(x: Activations, numbers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(x̂ · numbersᵀ) · x_scale · scales + bias: x̂ is x with each row rounded to the weight's type, its largest number
    to the largest there is (int8: 127, e4m3: 448), by a float32 x_scale; or x has been rounded so before.

    x [rows, in], numbers [out, in] int8 or e4m3, scales [out] float32, bias [out], result [rows, out] as x
    """
    return body(numbers).rounded_linear(x, numbers, scales, bias)


def rounded_gated_linear(
    x: Activations,
    numbers: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    kind: str,
    rounds_to: torch.dtype | None = None,
) -> Activations:
    """As gated_linear; numbers [2 · dim, in], result [rows, dim], rounded to int8 or e4m3 where `rounds_to` says so."""
    return body(numbers).rounded_gated_linear(x, numbers, scales, bias, kind, rounds_to)


def blockwise_linear(
    x: Tensor, numbers: Tensor, scales: Tensor, block: tuple[int, int], rounds_inputs: bool, bias: Tensor | None
) -> Tensor:
    """x · Wᵀ + bias of e4m3 with a scale for each block of rows and columns, the last of which may stick out.

    rounds_inputs: each row of x is rounded to e4m3 as well, with a scale for as many columns as a block has.
    x [rows, in], numbers [out, in] e4m3, scales [blocks of out, blocks of in] float32, result [rows, out]
    """
    return body(x).blockwise_linear(x, numbers, scales, block, rounds_inputs, bias)
