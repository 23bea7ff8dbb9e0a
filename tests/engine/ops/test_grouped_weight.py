"""Packing weights of grouped integers for the CUDA kernels, and back."""

import pytest
import torch

from engine.ops.cuda import grouped_weight
from engine.quantization.weight import Scheme, round_to_nearest


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "inputs"), [(32, 352), (64, 320), (128, 328), (0, 584)])
def test_what_is_packed_comes_back(bits, is_symmetric, group_size, inputs):
    whole = round_to_nearest(torch.randn(40, inputs), Scheme("int", bits, (1, group_size), is_symmetric))
    scales = whole.scales.half()
    packed = grouped_weight.empty(40, inputs, group_size or inputs, bits, torch.bfloat16)
    for part in (slice(0, 32), slice(32, 40)):
        zeros = None if whole.zeros is None else whole.zeros[part]
        grouped_weight.put(packed, part.start, whole.numbers[part], scales[part], zeros)
    numbers, unpacked_scales, zeros = grouped_weight.unpack(packed)
    groups = scales.shape[1]
    assert torch.equal(numbers, whole.numbers)
    assert torch.equal(unpacked_scales[:, :groups], scales.float())
    expected = torch.zeros_like(scales, dtype=torch.int16) if whole.zeros is None else whole.zeros
    assert torch.equal(zeros[:, :groups], expected)


def test_four_bits_take_half_a_byte():
    packed = grouped_weight.empty(64, 256, 128, 4, torch.bfloat16)
    assert packed.packed.nbytes == 64 * 256 / 2
    assert packed.scales.nbytes == 64 * 2 * 4


def test_scales_of_many_digits_are_rounded_to_the_nearest():
    scales = torch.rand(16, 1) + 0.5
    packed = grouped_weight.empty(16, 64, 64, 4, torch.float16)
    grouped_weight.put(packed, 0, torch.zeros(16, 64, dtype=torch.int8), scales, None)
    error = grouped_weight.unpack(packed)[1] / scales - 1
    assert error.abs().max() <= 2.0**-16


def test_groups_that_kernels_know():
    assert all(grouped_weight.knows_groups(576, size) for size in (576, 32, 64, 128, 192))
    assert not grouped_weight.knows_groups(576, 96)
    assert not grouped_weight.knows_groups(580, 64)
