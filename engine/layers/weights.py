"""What a linear layer multiplies with, in the form in which it lies on the device.

A layer keeps its weight as `layer.weight` from `load` on and asks nothing of it but its products. So a calibration can
put a weight in its place that watches what comes in, or the quantized one that it has just made.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from engine import ops


class Weight(ABC):
    """A matrix W [out, in], or this rank's share of it."""

    @abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x · Wᵀ + bias: x [rows, in], bias [out], result [rows, out]."""

    def apply_gated(self, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        """f(gate) · up of a W that is gate, then up: result [rows, out / 2], f = silu or gelu_tanh (kind)."""
        return ops.gated_activation(self.apply(x, bias), kind)


@dataclass(frozen=True)
class PlainWeight(Weight):
    tensor: Tensor  # [out, in], in the model's type

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, self.tensor, bias)

    def apply_gated(self, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        return ops.gated_linear(x, self.tensor, bias, kind)
