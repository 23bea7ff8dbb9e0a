"""Scales and zeros of a weight's groups: the ones with the least squared error, each input weighted by its importance.

The largest number of a group need not be on the grid: a narrower range costs one weight more and the others less, which
AWQ (arXiv 2306.00978) calls clipping.
"""

import torch
from torch import Tensor

from engine.quantization.weight import ALL, E4M3, E4M3_MAX, Scheme, round_to_nearest

NARROWEST = 0.4  # share of the range that round_to_nearest spans
NUM_RANGES = 25


def search_grid(weight: Tensor, scheme: Scheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best scales, and zeros if the scheme has them, for rows or groups of neighbours in a weight [out, in].

    `importance` [in] are the weights of the squared errors, as the diagonal of a Hessian. The scales of
    `round_to_nearest` are among those tried, and a weight of integers that is on a grid already keeps it.
    """
    widest = round_to_nearest(weight, scheme)
    size = weight.shape[1] if scheme.block[1] == ALL else scheme.block[1]
    groups = weight.float().unflatten(1, (-1, size))  # [out, groups, size]
    importance = importance.unflatten(0, (-1, size))
    zero = torch.zeros_like(widest.scales) if widest.zeros is None else widest.zeros.float()
    zero = zero[..., None]
    scales, least = widest.scales, torch.full_like(widest.scales, torch.inf)
    for share in _shares(scheme):
        scale = (widest.scales * share)[..., None]
        numbers = to_numbers(groups / scale + zero, scheme)
        error = ((numbers - zero).mul_(scale).sub_(groups).square_() * importance).sum(-1)
        scales = torch.where(error < least, scale[..., 0], scales)
        least = torch.minimum(error, least)
    return scales, widest.zeros


def to_numbers(steps: Tensor, scheme: Scheme) -> Tensor:
    """The nearest numbers that the scheme's weights are made of, in float32. May write over `steps`."""
    if scheme.kind == "float":
        return steps.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).float()
    return steps.round_().clamp_(scheme.lowest, -1 - scheme.lowest)


def _shares(scheme: Scheme) -> list[float]:
    """What to multiply the scales of the full range by."""
    if scheme.kind == "float":  # twice the scale is the same grid again, but for the smallest numbers
        return [2 ** (i / 16) for i in range(16)]
    shares = torch.linspace(1.0, NARROWEST, NUM_RANGES).tolist()
    if scheme.is_symmetric:  # the largest number on the lowest or the highest integer, not between the two
        shares += [(end + 0.5) / end for end in (scheme.lowest, -1 - scheme.lowest)]
    return shares
