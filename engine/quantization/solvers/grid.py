"""Scales and zeros of a weight's groups: the ones with the least squared error, each input weighted by its importance.

The largest number of a group need not be on the grid: a narrower range costs one weight more and the others less, which
AWQ (arXiv 2306.00978) calls clipping.
"""

import torch
from torch import Tensor

from engine.quantization.weight import ALL, Scheme, round_to_nearest

NARROWEST = 0.4  # share of the range that round_to_nearest spans
NUM_RANGES = 25


def search_grid(weight: Tensor, scheme: Scheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best scales, and zeros if the scheme has them, for groups of a weight [out, in] of integers.

    `importance` [in] are the weights of the squared errors, as the diagonal of a Hessian. A group's inputs lie side by
    side. The range of `round_to_nearest` is among those tried, and a weight that is on a grid already keeps it.
    """
    widest = round_to_nearest(weight, scheme)
    size = weight.shape[1] if scheme.block[1] == ALL else scheme.block[1]
    groups = weight.float().unflatten(1, (-1, size))  # [out, groups, size]
    importance = importance.unflatten(0, (-1, size))
    lowest, highest = scheme.lowest, -1 - scheme.lowest
    shares = torch.linspace(1.0, NARROWEST, NUM_RANGES).tolist()
    if scheme.is_symmetric:  # the largest number on the lowest or the highest integer, not between the two
        shares += [(lowest + 0.5) / lowest, (highest + 0.5) / highest]
    zero = torch.zeros_like(widest.scales) if widest.zeros is None else widest.zeros.float()
    zero = zero[..., None]
    scales, least = widest.scales, torch.full_like(widest.scales, torch.inf)
    for share in shares:
        scale = (widest.scales * share)[..., None]
        numbers = (groups / scale + zero).round_().clamp_(scheme.lowest, highest)
        error = ((numbers - zero).mul_(scale).sub_(groups).square_() * importance).sum(-1)
        scales = torch.where(error < least, scale[..., 0], scales)
        least = torch.minimum(error, least)
    return scales, widest.zeros
