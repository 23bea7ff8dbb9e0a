"""Root-mean-square norms."""

import torch
from torch import Tensor

from engine.ops.activations import RoundedRows
from engine.ops.dispatch import body


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, row by row, in float32.   x, y [rows, dim], weight [dim]"""
    return body(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; then rms_norm(residual).   x, residual, result [rows, dim], weight [dim]"""
    return body(x).add_rms_norm(x, residual, weight, eps)


def add_rms_norm_rounded(x: Tensor, residual: Tensor, weight: Tensor, eps: float, stored: torch.dtype) -> RoundedRows:
    """add_rms_norm, its result rounded row by row to int8 or e4m3 (`stored`)."""
    return body(x).add_rms_norm_rounded(x, residual, weight, eps, stored)
