"""Matrix products."""

from torch import Tensor

from engine.ops.dispatch import body


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias.   x [rows, in], weight [out, in], bias [out], result [rows, out]"""
    return body(x).linear(x, weight, bias)
