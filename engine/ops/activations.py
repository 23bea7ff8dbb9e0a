"""Rows of 8 bits, on their way from what makes them to products of rounded inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoundedRows:
    """Rows x [rows, dim] ≈ numbers · scales, rounded as the products of their device want it."""

    numbers: Tensor  # [rows, dim] int8 or e4m3; on a CPU e4m3 may be numbers of x's type
    scales: Tensor  # [rows] float32; of panels on a GPU [panels, rows], with room up to a multiple of 128 rows
    dtype: torch.dtype  # of x, and of products with them


Activations = Tensor | RoundedRows  # inputs of a product
