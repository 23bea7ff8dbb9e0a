"""AWQ (arXiv 2306.00978): inputs that are large get finer weights, by a scale that what comes before takes back."""

import torch
from torch import Tensor

from engine.quantization.solvers.grid import search_grid
from engine.quantization.solvers.inputs import Inputs, output_error
from engine.quantization.weight import QuantizedWeight, Scheme, round_to_grid, round_to_nearest

NUM_POWERS = 20


def awq(weight: Tensor, inputs: Inputs, scheme: Scheme, *, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """A weight [out, in] rounded to nearest on the grid of least error for its inputs, with scales of `scale_dtype`."""
    scales, zeros = search_grid(weight, scheme, inputs.hessian.diagonal())
    return round_to_grid(weight, scheme, scales.to(scale_dtype), zeros)


def awq_scales(weights: list[Tensor], inputs: Inputs, scheme: Scheme) -> Tensor:
    """What to multiply the columns of weights [out, in] of the same inputs by, and divide the inputs by.   [in]

    Powers of the inputs' mean magnitude are tried, 0 (no scaling) to 1, with weights rounded to nearest; the least
    output error wins.
    """
    magnitude = inputs.magnitude.clamp(min=1e-4 * inputs.magnitude.max().item() + torch.finfo(torch.float32).tiny)
    hessian = inputs.hessian
    best, best_error = torch.ones_like(magnitude), torch.inf
    for step in range(NUM_POWERS + 1):
        scales = magnitude ** (step / NUM_POWERS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight in weights:
            rounded = round_to_nearest(weight.float() * scales, scheme).dequantize() / scales
            error += output_error(rounded - weight.float(), hessian).sum().item()
        if error < best_error:
            best, best_error = scales, error
    return best
