"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for each one's error.

Written as in QuIP (arXiv 2307.13304, theorem 6), which needs no inverse: with H = U·D·Uᵀ, U unit upper triangular, a
column is rounded after the errors of the columns before it, times U's column, are added. The error of the outputs is
then the sum of D times the squared distances of what was rounded, so D says how much each column of a grid matters:
the diagonal of H instead would count what other columns make up for.

What is left is lowered by turns (`fit_scales`, `sweep`).
"""

import torch
from torch import Tensor

from engine.quantization.solvers.grid import search_grid, to_numbers
from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme

BLOCK = 128  # columns; errors of those before reach a block in one matrix product


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    act_order: bool = False,
    damping: float = 0.02,
    num_turns: int = 2,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """A weight [out, in] in numbers that keep its outputs, `hessian` [in, in] being the mean of xᵀx of its inputs.

    The scheme's scales are those of rows, or of groups of neighbours in them that divide the inputs.
    Inputs are taken from the largest to the smallest. With `act_order` they are grouped in this order as well
    (`group_of`); without, groups are of neighbours. `damping` is added to the Hessian's diagonal, as a share of its
    mean. After `num_turns` of bettering scales and numbers, 0 for GPTQ alone, the scales are numbers of `scale_dtype`.
    """
    assert scheme.block[0] == 1, scheme
    out_features, in_features = weight.shape
    size = in_features if scheme.block[1] == ALL else scheme.block[1]
    assert in_features % size == 0, (in_features, size)

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian, feedback, costs = _decompose(hessian.float()[order][:, order], damping)
    layout = order if act_order else torch.arange(in_features, device=weight.device)
    importance, group_of = torch.empty_like(costs), torch.empty_like(order)
    importance[order] = costs
    group_of[layout] = torch.arange(in_features, device=weight.device) // size
    scales, zeros = search_grid(weight[:, layout], scheme, importance[layout])

    # From here on columns lie as rows, in the order of the work.
    columns = _Columns(weight.T[order].float(), hessian, scheme, group_of[order], scales.T, zeros, scale_dtype)
    columns.round(feedback)
    for _ in range(num_turns):
        columns.fit_scales()
        columns.sweep()
    dtype = torch.int8 if scheme.kind == "int" else E4M3
    numbers = torch.empty(in_features, out_features, dtype=dtype, device=weight.device)
    numbers[order] = columns.numbers.to(dtype)
    scales = columns.scales.T.to(scale_dtype).contiguous()
    return QuantizedWeight(scheme, numbers.T.contiguous(), scales, zeros, group_of.int() if act_order else None)


class _Columns:
    """A weight's columns while they are rounded: `numbers` less `zeros`, times `scales`, is `weight` less `errors`."""

    def __init__(
        self,
        weight: Tensor,  # [in, out]
        hessian: Tensor,  # [in, in]
        scheme: Scheme,
        group_of: Tensor,  # [in]
        scales: Tensor,  # [groups, out]
        zeros: Tensor | None,  # [out, groups]
        scale_dtype: torch.dtype,
    ) -> None:
        self.weight, self.hessian, self.scheme, self.group_of = weight, hessian, scheme, group_of
        self.scale_dtype = scale_dtype
        self.zeros = torch.zeros_like(weight) if zeros is None else zeros.T[group_of].float()
        self.numbers, self.errors = torch.zeros_like(weight), torch.zeros_like(weight)
        self._set_scales(scales)

    def _set_scales(self, scales: Tensor) -> None:
        self.scales = scales.to(self.scale_dtype).float()
        self.column_scales = self.scales[self.group_of]  # [in, out]
        self.errors = self.weight - (self.numbers - self.zeros) * self.column_scales

    def _round(self, i: int, target: Tensor) -> None:
        """Column i to what is nearest to the target."""
        self.numbers[i] = to_numbers(target / self.column_scales[i] + self.zeros[i], self.scheme)
        self.errors[i] = self.weight[i] - (self.numbers[i] - self.zeros[i]) * self.column_scales[i]

    def round(self, feedback: Tensor) -> None:
        """All columns for the first time, each after those before it."""
        for start in range(0, len(self.weight), BLOCK):
            end = min(start + BLOCK, len(self.weight))
            targets = self.weight[start:end] + feedback[:start, start:end].T @ self.errors[:start]
            for i in range(start, end):
                self._round(i, targets[i - start] + feedback[start:i, i] @ self.errors[start:i])

    def sweep(self) -> None:
        """Each column to its best, the others held: coordinate descent, as in QuantEase (arXiv 2309.01885)."""
        diagonal = self.hessian.diagonal()
        for start in range(0, len(self.weight), BLOCK):
            end = min(start + BLOCK, len(self.weight))
            slopes = self.hessian[start:end] @ self.errors
            before = self.errors[start:end].clone()
            for i in range(start, end):
                slope = slopes[i - start] + self.hessian[i, start:i] @ (self.errors[start:i] - before[: i - start])
                self._round(i, self.weight[i] - self.errors[i] + slope / diagonal[i])

    def fit_scales(self) -> None:
        """The scales to their best, the numbers held: for each output least squares with an unknown for each group."""
        steps = self.numbers - self.zeros
        num_groups = len(self.scales)
        members = torch.nn.functional.one_hot(self.group_of, num_groups).float().T  # [groups, in]
        slopes = (members @ (steps * (self.hessian @ self.errors))).T  # [out, groups]
        own = members.bool()
        curves = torch.stack([members @ (self.hessian[:, one] @ steps[one] * steps) for one in own]).permute(2, 0, 1)
        diagonal = curves.diagonal(dim1=1, dim2=2)
        # A little of the diagonal more, and at least something: a group may be all zeros.
        ridge = 1e-4 * diagonal + 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
        change = torch.linalg.solve(curves + torch.diag_embed(ridge), slopes).T
        scales = self.scales + change
        is_sane = (scales > 0.5 * self.scales) & (scales < 2 * self.scales)
        self._set_scales(torch.where(is_sane, scales, self.scales))


def _decompose(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """H damped until it is positive definite, U and the diagonal of D of H = U·D·Uᵀ, U unit upper triangular."""
    assert hessian.isfinite().all()
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (mean * damping)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0:
            upper = lower.flip(0, 1)
            return damped, upper / upper.diagonal(), upper.diagonal().square()
        damping = max(10 * damping, 1e-5)
