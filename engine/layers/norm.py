"""Root-mean-square norm, alone or with the addition to the residual stream that comes before it."""

import torch
from torch import Tensor

from engine import ops
from engine.checkpoint import Checkpoint
from engine.layers.placement import Placement


class RMSNorm:
    """Whole on every rank. offset: Gemma stores w of a norm that multiplies by 1 + w; the sum is kept in float32."""

    def __init__(self, name: str, dim: int, eps: float, placement: Placement, offset: float = 0.0) -> None:
        self.name, self.eps, self.offset = name, eps, offset
        self.weight = placement.empty(dim, dtype=torch.float32 if offset else None)

    def load(self, ckpt: Checkpoint) -> None:
        ckpt.read(f"{self.name}.weight", self.weight, plus=self.offset)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to the residual, in place, and returns the norm of the sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

    def add_rounded(self, x: Tensor, residual: Tensor, stored: torch.dtype) -> ops.RoundedRows:
        """The same, rounded row by row to int8 or e4m3."""
        return ops.add_rms_norm_rounded(x, residual, self.weight, self.eps, stored)
