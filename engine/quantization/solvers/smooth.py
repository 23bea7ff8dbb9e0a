"""SmoothQuant (arXiv 2211.10438): inputs that are rounded leave their outliers to the weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.ops.reference import round_rows
from engine.quantization.weight import E4M3, Scheme, round_to_nearest

STRENGTHS = [step / 20 for step in range(21)]


def smooth_scales(
    weights: Sequence[Tensor], x: Tensor, magnitude: Tensor, scheme: Scheme, tie: Callable[[Tensor], Tensor]
) -> Tensor:
    """What to divide inputs by, and multiply the columns of weights [out, in] with that share them.   [in] float32

    x [rows, in]: some of the inputs; magnitude [in]: the root of the mean square of all of them, not the paper's
    largest value, which a single token can set though its row has a scale of its own. tie: gives inputs that must
    have the same scale the largest of their values. Of the paper's strengths the one is taken with the least error of
    the outputs when both sides are rounded: not relative to each row's own, since large rows are those that later
    tokens attend to most. (Variants of this gave the default model perplexities of 31.50 to 31.67, not far from noise.)
    """
    heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    magnitude, heaviest = (tie(part).clamp(min=1e-5 * part.max().item() + 1e-30) for part in (magnitude, heaviest))
    exact = [x @ weight.T for weight in weights]
    best, best_error = torch.ones_like(magnitude), _error(weights, x, exact, torch.ones_like(magnitude), scheme)
    for strength in STRENGTHS:
        scales = magnitude**strength / heaviest ** (1 - strength)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = _error(weights, x, exact, scales, scheme)
        if error < best_error:
            best, best_error = scales, error
    return best


def round_inputs(x: Tensor, scheme: Scheme) -> Tensor:
    """x [rows, in] as it is when each row is rounded with a scale of its own, as schemes do that say so."""
    numbers, scales = round_rows(x.float(), E4M3 if scheme.kind == "float" else torch.int8)
    return numbers.float() * scales


def _error(weights: Sequence[Tensor], x: Tensor, exact: Sequence[Tensor], scales: Tensor, scheme: Scheme) -> float:
    rounded = round_inputs(x / scales, scheme)
    total = 0.0
    for weight, wanted in zip(weights, exact, strict=True):
        found = rounded @ round_to_nearest(weight * scales, scheme).dequantize().T
        total += (found - wanted).square().sum().item()
    return total
