"""What the inputs of a linear layer tell about errors in its weight: their second moments, gathered batch by batch."""

import torch
from torch import Tensor

# As often the first token of a text counts in a Hessian. Every later token attends to it and its activations are huge
# (arXiv 2309.17453, 2402.17762), so an error in it is an error in all: perplexity 32.6, and 33.6 if it counts once.
FIRST_TOKEN_COUNT = 8.0


class Inputs:
    """Sums over every input row that a layer saw, float32 on one device, whatever the number of rows."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = 0
        self._products = torch.zeros(in_features, in_features, device=device)
        self._magnitudes = torch.zeros(in_features, device=device)

    def add(self, x: Tensor, counts: Tensor | None = None) -> None:
        """Take in rows [..., in] of any floating type; the Hessian has each as often as `counts` says, [...]."""
        rows = x.reshape(-1, x.shape[-1]).to(self._products)
        self.num_rows += len(rows)
        counted = rows if counts is None else rows * counts.reshape(-1, 1)
        self._products.addmm_(rows.T, counted)
        self._magnitudes += rows.abs().sum(0)

    @property
    def hessian(self) -> Tensor:
        """The sum of xᵀx by the number of rows, [in, in]: an error E of the weight costs trace(E · hessian · Eᵀ)."""
        return self._products / max(self.num_rows, 1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, [in]."""
        return self._magnitudes / max(self.num_rows, 1)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared error of each output that an error [out, in] of the weight makes.   [out]"""
    return ((error @ hessian) * error).sum(1)
