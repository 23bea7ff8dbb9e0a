"""Rounding to a grid: each number is as near as the grid allows, whatever the blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme, round_to_nearest

BLOCKS = [(1, 4), (1, ALL), (ALL, ALL), (8, 8), (3, 5)]


def weights(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(out_features, 1, generator=generator)
    return sizes * torch.randn(out_features, in_features, generator=generator)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_no_integer_is_further_from_its_number_than_half_a_step(block, bits, is_symmetric):
    weight = weights(16, 20)
    found = round_to_nearest(weight, Scheme("int", bits, block, is_symmetric))
    step = found._expand(found.scales).expand_as(weight)
    error = (found.dequantize() - weight).abs()
    # The zero of an asymmetric grid is rounded as well, so the block's extremes may lie half a step outside.
    assert (error <= (0.5 if is_symmetric else 1.0) * step * 1.0001).all()
    assert found.numbers.dtype == torch.int8
    assert -(2 ** (bits - 1)) <= found.numbers.min().item() <= found.numbers.max().item() < 2 ** (bits - 1)
    assert found.scales.shape == found.scheme.grid_shape(16, 20)


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from(BLOCKS), st.integers(0, 99))
def test_e4m3_keeps_three_bits_of_mantissa(out_features, in_features, block, seed):
    weight = weights(out_features, in_features, seed)
    found = round_to_nearest(weight, Scheme("float", 8, block))
    assert found.numbers.dtype == E4M3
    step = found._expand(found.scales).expand_as(weight)
    assert ((found.dequantize() - weight).abs() <= (weight.abs() / 16).maximum(step * 2**-9) * 1.001).all()


def test_a_block_of_zeros_stays_zero():
    for scheme in (Scheme("int", 4, (1, 4)), Scheme("int", 4, (1, 4), False), Scheme("float", 8, (1, ALL))):
        assert not round_to_nearest(torch.zeros(2, 8), scheme).dequantize().any()


def test_inputs_find_the_scale_of_their_group():
    scheme = Scheme("int", 4, (1, 2))
    numbers, scales = torch.ones(1, 4, dtype=torch.int8), torch.tensor([[1.0, 10.0]])
    plain = QuantizedWeight(scheme, numbers, scales)
    assert plain.dequantize().tolist() == [[1, 1, 10, 10]]
    ordered = QuantizedWeight(scheme, numbers, scales, group_of=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    assert ordered.dequantize().tolist() == [[10, 1, 10, 1]]
    shifted = QuantizedWeight(scheme, numbers, scales, zeros=torch.tensor([[0, 3]], dtype=torch.int16))
    assert shifted.dequantize().tolist() == [[1, 1, -20, -20]]
