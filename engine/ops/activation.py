"""The gated activation of an MLP."""

from torch import Tensor

from engine.ops.dispatch import body


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """f(gate) · up, f = silu or gelu_tanh (kind).   gate_up [rows, 2 · dim]: gate, then up; result [rows, dim]"""
    return body(gate_up).gated_activation(gate_up, kind)
