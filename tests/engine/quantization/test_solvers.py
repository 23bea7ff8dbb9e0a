"""GPTQ, AWQ and their grids against brute force and a naive float64 version."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.quantization.solvers.awq import awq, awq_scales
from engine.quantization.solvers.gptq import gptq
from engine.quantization.solvers.grid import search_grid
from engine.quantization.solvers.inputs import Inputs, output_error
from engine.quantization.weight import ALL, E4M3_MAX, QuantizedWeight, Scheme, round_to_grid, round_to_nearest

SCHEMES = [
    Scheme("int", 4, (1, 16)),
    Scheme("int", 4, (1, 16), is_symmetric=False),
    Scheme("int", 4, (1, ALL), is_symmetric=False),
    Scheme("int", 8, (1, ALL), rounds_inputs=True),
    Scheme("float", 8, (1, ALL), rounds_inputs=True),
]
INTEGERS = SCHEMES[:-1]


def a_weight(seed: int, out_features: int = 24, in_features: int = 64) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def some_inputs(seed: int, in_features: int = 64, num_rows: int = 400) -> Tensor:
    """Rows with inputs that depend on each other, and a few that are far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features // 2, in_features, generator=generator)
    x = torch.randn(num_rows, in_features // 2, generator=generator) @ mix
    x += 0.3 * torch.randn(num_rows, in_features, generator=generator)
    return x * torch.where(torch.rand(in_features, generator=generator) < 0.1, 20.0, 1.0)


def hessian_of(x: Tensor) -> Tensor:
    inputs = Inputs(x.shape[1])
    inputs.add(x)
    return inputs.hessian


def error_of(quantized: QuantizedWeight, weight: Tensor, hessian: Tensor) -> float:
    return output_error(quantized.dequantize() - weight, hessian).sum().item()


def test_inputs_are_the_same_in_one_batch_or_many():
    x = some_inputs(0)
    whole, parts = Inputs(64), Inputs(64)
    whole.add(x)
    for part in x.split(33):
        parts.add(part.unsqueeze(0))
    torch.testing.assert_close(whole.hessian, (x.double().T @ x.double() / len(x)).float())
    torch.testing.assert_close(parts.hessian, whole.hessian)
    torch.testing.assert_close(parts.magnitude, x.abs().mean(0))


def test_a_row_that_counts_three_times_is_three_rows_of_the_hessian():
    x = some_inputs(0, num_rows=6)
    counted, repeated = Inputs(64), Inputs(64)
    counted.add(x.view(2, 3, 64), torch.tensor([[3.0, 1.0, 1.0]]).expand(2, 3))
    repeated.add(torch.cat([x, x[[0, 0, 3, 3]]]))
    torch.testing.assert_close(counted.hessian * 6, repeated.hessian * 10, rtol=1e-4, atol=1e-3)


def test_output_error_is_the_mean_square_of_what_the_outputs_are_off():
    x, error = some_inputs(1), a_weight(1)
    torch.testing.assert_close(output_error(error, hessian_of(x)), (x @ error.T).square().mean(0), rtol=1e-4, atol=1e-4)


def naive_gptq(weight: Tensor, hessian: Tensor, like: QuantizedWeight, damping: float) -> Tensor:
    """Optimal brain quantization in the order of the diagonal, inverting what is left after each column, in float64."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    left = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    while len(left):
        column, left = left[0], left[1:]
        inverse = torch.linalg.inv(hessian[torch.cat([column[None], left])][:, torch.cat([column[None], left])])
        rounded = round_to_grid(weight.float(), like.scheme, like.scales, like.zeros)
        if like.group_of is not None:
            scales = like.scales[:, like.group_of.long()]
            zeros = like.zeros[:, like.group_of.long()] if like.zeros is not None else torch.zeros_like(scales)
            exact = (weight / scales + zeros).round().clamp(like.scheme.lowest, -1 - like.scheme.lowest)
            rounded = QuantizedWeight(like.scheme, exact.to(torch.int8), like.scales, like.zeros, like.group_of)
        numbers[:, column] = rounded.numbers[:, column]
        error = weight[:, column] - rounded.dequantize()[:, column].double()
        weight[:, left] -= error[:, None] * (inverse[0, 1:] / inverse[0, 0])
    return numbers


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", INTEGERS)
def test_gptq_rounds_as_the_naive_algorithm_does(scheme: Scheme, act_order: bool):
    weight, hessian = a_weight(2), hessian_of(some_inputs(2))
    quantized = gptq(weight, hessian, scheme, act_order=act_order, damping=0.01, num_turns=0)
    expected = naive_gptq(weight, hessian, quantized, damping=0.01)
    assert (quantized.numbers != expected).float().mean() < 0.001  # a tie may fall either way in float32


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_is_better_than_rounding_to_nearest(scheme: Scheme, act_order: bool, seed: int):
    weight, hessian = a_weight(seed), hessian_of(some_inputs(seed + 50))
    ours = error_of(gptq(weight, hessian, scheme, act_order=act_order), weight, hessian)
    assert ours < 0.9 * error_of(round_to_nearest(weight, scheme), weight, hessian)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_turn_after_the_rounding_makes_it_better(scheme: Scheme):
    weight, hessian = a_weight(20), hessian_of(some_inputs(20))
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(64)
    turns = [gptq(weight, hessian, scheme, damping=0.0, num_turns=turns) for turns in range(4)]
    errors = [output_error(quantized.dequantize() - weight, hessian) for quantized in turns]
    assert all((after <= before * (1 + 1e-3)).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.97 * errors[0].sum()


@pytest.mark.parametrize("scheme", INTEGERS)
def test_after_many_turns_no_other_scale_and_no_other_integer_is_better(scheme: Scheme):
    weight, hessian = a_weight(21, 6), hessian_of(some_inputs(21))
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(64)
    quantized = gptq(weight, hessian, scheme, damping=0.0, num_turns=40)
    least = output_error(quantized.dequantize() - weight, hessian)
    for group, change in itertools.product(range(quantized.scales.shape[1]), (0.998, 1.002)):
        scales = quantized.scales.clone()
        scales[:, group] *= change
        error = output_error(replace(quantized, scales=scales).dequantize() - weight, hessian)
        assert (error >= least * (1 - 1e-3)).all()
    for column, change in itertools.product(range(64), (-1, 1)):
        numbers = quantized.numbers.clone()
        numbers[:, column] = (numbers[:, column] + change).clamp(scheme.lowest, -1 - scheme.lowest)
        error = output_error(replace(quantized, numbers=numbers).dequantize() - weight, hessian)
        assert (error >= least * (1 - 1e-3)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_numbers_of_the_type_that_is_stored(scheme: Scheme, dtype: torch.dtype):
    weight, inputs = a_weight(22), Inputs(64)
    inputs.add(some_inputs(22))
    exact = gptq(weight, inputs.hessian, scheme)
    stored = gptq(weight, inputs.hessian, scheme, scale_dtype=dtype)
    assert stored.scales.dtype == awq(weight, inputs, scheme, scale_dtype=dtype).scales.dtype == dtype
    too_late = replace(exact, scales=exact.scales.to(dtype))
    assert error_of(stored, weight, inputs.hessian) < 1.02 * error_of(too_late, weight, inputs.hessian)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_leaves_a_weight_that_is_on_its_grid(scheme: Scheme):
    rounded = round_to_nearest(a_weight(3), scheme)
    ends = (scheme.lowest, -1 - scheme.lowest) if scheme.kind == "int" else (-E4M3_MAX, E4M3_MAX)
    rounded.numbers[:, ::16], rounded.numbers[:, 1::16] = ends
    weight = rounded.dequantize()
    again = gptq(weight, hessian_of(some_inputs(3)), scheme)
    torch.testing.assert_close(again.dequantize(), weight)


def test_gptq_follows_a_new_order_of_the_inputs():
    scheme = Scheme("int", 4, (1, 16))
    weight, x = a_weight(4), some_inputs(4)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    straight = gptq(weight, hessian_of(x), scheme, act_order=True).dequantize()
    shuffled = gptq(weight[:, shuffle], hessian_of(x[:, shuffle]), scheme, act_order=True).dequantize()
    torch.testing.assert_close(shuffled, straight[:, shuffle], rtol=1e-4, atol=1e-4)


def test_gptq_takes_inputs_that_never_came_and_inputs_that_are_equal():
    x = some_inputs(5)
    x[:, 7] = 0
    x[:, 9] = x[:, 8]
    weight = a_weight(5)
    quantized = gptq(weight, hessian_of(x), Scheme("int", 4, (1, 16)), damping=0.0).dequantize()
    assert quantized.isfinite().all()
    step = weight.abs().amax() / 7.5
    assert (quantized[:, 7] - weight[:, 7]).abs().max() <= step  # nothing is known of it: rounded to nearest


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_finds_nearly_the_best_of_all_integers(act_order: bool):
    """Six inputs, so that every combination can be tried on the grid that it chose."""
    scheme = Scheme("int", 4, (1, ALL))
    weight, hessian = a_weight(6, 1, 6), hessian_of(some_inputs(6, 6))
    quantized = gptq(weight, hessian, scheme, act_order=act_order, damping=1e-6)
    steps = (weight / quantized.scales).squeeze(0)
    choices = [
        (step.floor().item() - 1, step.floor().item(), step.ceil().item(), step.ceil().item() + 1) for step in steps
    ]
    candidates = torch.tensor(list(itertools.product(*choices))).clamp(-8, 7) * quantized.scales.item()
    best = output_error(candidates - weight, hessian).min().item()
    assert best <= error_of(quantized, weight, hessian) * (1 + 1e-4)
    assert error_of(quantized, weight, hessian) < 0.5 * error_of(round_to_nearest(weight, scheme), weight, hessian)
    assert error_of(quantized, weight, hessian) < 2 * best


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_searched_grid_is_never_worse_than_the_full_range(scheme: Scheme):
    weight, importance = a_weight(7), some_inputs(7).square().mean(0)
    searched = round_to_grid(weight, scheme, *search_grid(weight, scheme, importance)).dequantize()
    widest = round_to_nearest(weight, scheme).dequantize()
    errors, full = ((w - weight).square() @ importance for w in (searched, widest))
    assert (errors <= full * (1 + 1e-5)).all()
    assert errors.sum() < full.sum() or scheme.bits == 8


def test_awq_scales_help_inputs_that_are_large():
    scheme = Scheme("int", 4, (1, 16))
    weights = [a_weight(8), a_weight(9, 8)]
    inputs = Inputs(64)
    inputs.add(some_inputs(8))
    scales = awq_scales(weights, inputs, scheme)
    assert scales[inputs.magnitude.argmax()] > 2 * scales.median()

    def error(s: Tensor) -> float:
        rounded = [round_to_nearest(w * s, scheme).dequantize() / s for w in weights]
        return sum(output_error(r - w, inputs.hessian).sum().item() for r, w in zip(rounded, weights, strict=True))

    assert error(scales) < 0.8 * error(torch.ones(64))


def test_awq_does_not_scale_inputs_that_are_alike():
    inputs = Inputs(64)
    inputs.add(torch.eye(64))
    torch.testing.assert_close(awq_scales([a_weight(10)], inputs, Scheme("int", 4, (1, 16))), torch.ones(64))


def test_awq_survives_inputs_that_never_came():
    x = some_inputs(11)
    x[:, :5] = 0
    inputs = Inputs(64)
    inputs.add(x)
    scheme = Scheme("int", 4, (1, 16), is_symmetric=False)
    assert awq_scales([a_weight(11)], inputs, scheme).isfinite().all()
    assert awq(a_weight(11), inputs, scheme).dequantize().isfinite().all()
