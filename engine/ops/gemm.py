"""Matrix products."""

from torch import Tensor

from engine.ops.dispatch import body


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias.   x [rows, in], weight [out, in], bias [out], result [rows, out]"""
    return body(x).linear(x, weight, bias)


def add_norm_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear(add_rms_norm(x, residual, norm, eps), weight, bias): residual += x in place, then the sum's norm is x."""
    return body(x).add_norm_linear(x, residual, norm, eps, weight, bias)


def add_norm_gated_linear(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, kind: str
) -> Tensor:
    """residual += x in place; f(y · gateᵀ) · (y · upᵀ), y the sum's norm, f = silu or gelu_tanh (kind).

    x, residual [rows, in], norm [in], weight [2 · dim, in]: gate, then up; bias [2 · dim], result [rows, dim]
    """
    return body(x).add_norm_gated_linear(x, residual, norm, eps, weight, bias, kind)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden · weightᵀ in float32: 16 bits would make ties of what lies close together.

    hidden [n, hidden_size], weight [vocab, hidden_size], result [n, vocab] float32
    """
    return body(hidden).logits(hidden, weight)
