"""What the inputs of a linear layer tell about errors in its weight: their second moments, gathered batch by batch."""

import torch
from torch import Tensor


class Inputs:
    """Sums over every input row that a layer saw, float32 on one device, whatever the number of rows."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = 0
        self._products = torch.zeros(in_features, in_features, device=device)
        self._magnitudes = torch.zeros(in_features, device=device)
        self.largest = torch.zeros(in_features, device=device)  # [in], of the absolute values

    def add(self, x: Tensor) -> None:
        """Take in rows [..., in] of any floating type."""
        rows = x.reshape(-1, x.shape[-1]).to(self._products)
        self.num_rows += len(rows)
        self._products.addmm_(rows.T, rows)
        self._magnitudes += rows.abs().sum(0)
        torch.maximum(self.largest, rows.abs().amax(0), out=self.largest)

    @property
    def hessian(self) -> Tensor:
        """Mean of xᵀx, [in, in]: an error E in a weight makes one of trace(E · hessian · Eᵀ) in its outputs."""
        return self._products / max(self.num_rows, 1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, [in]."""
        return self._magnitudes / max(self.num_rows, 1)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of each output that an error [out, in] of the weight makes.   [out]"""
    return ((error @ hessian) * error).sum(1)
