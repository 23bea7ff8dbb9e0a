"""Matrix products."""

from torch import Tensor

from engine.ops.dispatch import body


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias.   x [rows, in], weight [out, in], bias [out], result [rows, out]"""
    return body(x).linear(x, weight, bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """f(x · gateᵀ) · (x · upᵀ), f = silu or gelu_tanh (kind); both products with their bias.

    x [rows, in], weight [2 · dim, in]: gate, then up; bias [2 · dim], result [rows, dim]
    """
    return body(x).gated_linear(x, weight, bias, kind)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """f(gate) · up, f = silu or gelu_tanh (kind).   gate_up [rows, 2 · dim]: gate, then up; result [rows, dim]"""
    return body(gate_up).gated_activation(gate_up, kind)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden · weightᵀ in float32: 16 bits would make ties of what lies close together.

    hidden [n, hidden_size], weight [vocab, hidden_size], result [n, vocab] float32
    """
    return body(hidden).logits(hidden, weight)
