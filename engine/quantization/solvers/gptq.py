"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for each one's error.

Written as in QuIP (arXiv 2307.13304, theorem 6), which needs no inverse: with H = U·D·Uᵀ, U unit upper triangular, a
column is rounded after the errors of the columns before it, times U's column, are added.
"""

import torch
from torch import Tensor

from engine.quantization.solvers.grid import search_grid
from engine.quantization.weight import ALL, QuantizedWeight, Scheme

BLOCK = 128  # columns; errors of those before reach a block in one matrix product


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, act_order: bool = False, damping: float = 0.01
) -> QuantizedWeight:
    """A weight [out, in] in integers that keep its outputs, `hessian` [in, in] being the mean of xᵀx of its inputs.

    Inputs are taken from the largest to the smallest. With `act_order` they are grouped in this order as well
    (`group_of`); without, groups are of neighbours. `damping` is added to the Hessian's diagonal, as a share of its
    mean. Scales are float32.
    """
    assert scheme.kind == "int", scheme
    assert scheme.block[0] == 1, scheme
    weight, hessian = weight.float(), hessian.float()
    out_features, in_features = weight.shape
    size = in_features if scheme.block[1] == ALL else scheme.block[1]
    assert in_features % size == 0, (in_features, size)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    layout = order if act_order else torch.arange(in_features, device=weight.device)
    scales, zeros = search_grid(weight[:, layout], scheme, hessian.diagonal()[layout])
    group_of = torch.empty(in_features, dtype=torch.int32, device=weight.device)
    group_of[layout] = torch.arange(in_features, dtype=torch.int32, device=weight.device) // size

    of_column = group_of[order].long()
    column_scales = scales.T[of_column]  # [in, out], in the order of the work
    column_zeros = torch.zeros_like(column_scales) if zeros is None else zeros.T[of_column].float()
    numbers = _round(weight.T[order], hessian[order][:, order], column_scales, column_zeros, scheme, damping)
    result = torch.empty(in_features, out_features, dtype=torch.int8, device=weight.device)
    result[order] = numbers
    return QuantizedWeight(scheme, result.T.contiguous(), scales, zeros, group_of if act_order else None)


def _round(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """Integers for the weight's columns, which lie as rows here as do their scales and zeros.   [in, out] int8"""
    feedback = _feedback(hessian, damping)
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.zeros_like(weight)
    for start in range(0, len(weight), BLOCK):
        end = min(start + BLOCK, len(weight))
        wanted = weight[start:end] + feedback[:start, start:end].T @ errors[:start]
        for i in range(start, end):
            target = wanted[i - start] + feedback[start:i, i] @ errors[start:i]
            number = (target / scales[i] + zeros[i]).round_().clamp_(scheme.lowest, -1 - scheme.lowest)
            errors[i] = weight[i] - (number - zeros[i]) * scales[i]
            numbers[i] = number
    return numbers


def _feedback(hessian: Tensor, damping: float) -> Tensor:
    """The unit upper triangular U of H = U·D·Uᵀ, H damped until it is positive definite."""
    assert hessian.isfinite().all()
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (mean * damping)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            upper = lower.flip(0, 1)
            return upper / upper.diagonal()
        damping = max(10 * damping, 1e-5)
