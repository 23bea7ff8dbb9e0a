"""Inputs with outliers: scales make what is left of their rounding small, and never make it worse."""

import pytest
import torch
from torch import Tensor

from engine.quantization.solvers.smooth import round_inputs, smooth_scales
from engine.quantization.weight import ALL, Scheme, round_to_nearest

INT8 = Scheme("int", 8, (1, ALL), rounds_inputs=True)


def untied(values: Tensor) -> Tensor:
    return values


def inputs_with_outliers(size: float) -> Tensor:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= size
    return x


def a_weight() -> Tensor:
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(1))


def error(x: Tensor, weight: Tensor, scales: Tensor) -> float:
    found = round_inputs(x / scales, INT8) @ round_to_nearest(weight * scales, INT8).dequantize().T
    return ((found - x @ weight.T).norm() / (x @ weight.T).norm()).item()


@pytest.mark.parametrize("size", [1, 10, 100])
def test_outliers_cost_less_with_scales(size):
    x, weight = inputs_with_outliers(size), a_weight()
    scales = smooth_scales([weight[:16], weight[16:]], x, x.square().mean(0).sqrt(), INT8, untied)
    plain = error(x, weight, torch.ones(32))
    assert error(x, weight, scales) <= plain * (1.01 if size == 1 else 0.7)


def test_tied_inputs_get_one_scale():
    x, weight = inputs_with_outliers(30), a_weight()

    def tie(values: Tensor) -> Tensor:
        pairs = values.view(16, 2)
        return pairs.amax(1, keepdim=True).expand_as(pairs).flatten()

    scales = smooth_scales([weight], x, x.square().mean(0).sqrt(), INT8, tie)
    assert torch.equal(scales[::2], scales[1::2])
    assert scales[4] > 2 * scales.median()


def test_an_input_that_never_comes_and_a_column_of_zeros_have_scales():
    x, weight = inputs_with_outliers(10), a_weight()
    x[:, 3], weight[:, 7] = 0, 0
    scales = smooth_scales([weight], x, x.square().mean(0).sqrt(), INT8, untied)
    assert scales.isfinite().all()
    assert (scales > 0).all()


@pytest.mark.parametrize("kind", ["int", "float"])
def test_inputs_are_rounded_row_by_row(kind):
    scheme = Scheme(kind, 8, (1, ALL), rounds_inputs=True)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 5)[:, None]
    steps = x.abs().amax(1, keepdim=True) / (127 if kind == "int" else 448 / 32)  # the largest ones of e4m3
    assert ((round_inputs(x, scheme) - x).abs() <= steps / 2 * 1.001).all()
