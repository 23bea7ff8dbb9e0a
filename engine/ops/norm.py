"""Root-mean-square norms."""

from torch import Tensor

from engine.ops.dispatch import body


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, row by row, in float32.   x, y [rows, dim], weight [dim]"""
    return body(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; then rms_norm(residual).   x, residual, result [rows, dim], weight [dim]"""
    return body(x).add_rms_norm(x, residual, weight, eps)
