"""Weights of grouped integers as the CUDA kernels read them (kernels/gemm/grouped.cuh), packed when a layer loads.

Of operand A of a product of 16 outputs and 16 inputs (`mma.m16n8k16`, and the same for a warp of `wgmma`) a lane holds
eight numbers: outputs lane / 4 + 8 · half, and inputs 8 · eight + 2 · (lane % 4) + odd. Packed, they are the 4-bit
digits of a word at 4 · (4 · odd + 2 · eight + half), or, as 8-bit numbers, bytes 2 · odd + half of word `eight` of two:
from there a shift and a mask leave one number in each half of a word.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops.grouped import GroupedWeight

OUTPUTS, CHUNK = 16, 64  # of a piece of a packed weight; inputs
SMALL_GROUP = 32  # inputs: a chunk holds two such groups, or a part of one group
_ROWS_AT_ONCE = 4096  # of a weight that is packed


@dataclass(frozen=True)
class PackedWeight(GroupedWeight):
    """Outputs are filled up to 16s, inputs to chunks of 64.

    packed [out / 16, in / 64, pieces, 32 lanes, 4] int32: one piece of 4-bit numbers, two of 8-bit ones. scales
    [out / 16, groups, 16] int32: the bits of a float32 scale, the lowest 8 of which are the zero. No zeros beside.
    """

    in_features: int
    dtype: torch.dtype  # of x and y


def knows_groups(inputs: int, group_size: int) -> bool:
    """Whether the kernels know these groups."""
    return inputs % 8 == 0 and (group_size in (SMALL_GROUP, inputs) or group_size % CHUNK == 0)


def empty(
    out: int, inputs: int, group_size: int, bits: int, dtype: torch.dtype, take: Callable[..., Tensor] = torch.empty
) -> PackedWeight:
    """The memory of a weight, by `take(*shape, dtype=)`."""
    assert knows_groups(inputs, group_size), (inputs, group_size)
    sixteens, chunks = -(-out // OUTPUTS), -(-inputs // CHUNK)
    groups = 2 * chunks if group_size == SMALL_GROUP else -(-inputs // group_size)
    packed = take(sixteens, chunks, bits // 4, 32, 4, dtype=torch.int32)
    grid = take(sixteens, groups, OUTPUTS, dtype=torch.int32)
    return PackedWeight(out, bits, group_size, packed, grid, None, inputs, dtype)


def put(weight: PackedWeight, first_row: int, numbers: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """Fill rows of a weight from `first_row` on, a multiple of 16; their last sixteen belongs to them.

    numbers [n, in] int8 from -2^(bits - 1) on, the inputs of a group side by side; scales and zeros [n, groups], on any
    device. Scales that are float16 or bfloat16 stay exact, float32 ones keep 16 bits of fraction.
    """
    assert first_row % OUTPUTS == 0, first_row
    device, chunks = weight.packed.device, weight.packed.shape[1]
    for first in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = numbers[first : first + _ROWS_AT_ONCE].to(device)
        packed = _pack_numbers(rows, chunks, weight.bits)
        at = (first_row + first) // OUTPUTS
        weight.packed[at : at + len(packed)] = packed
    grid = _pack_grid(
        scales.to(device), None if zeros is None else zeros.to(device), weight.scales.shape[1], weight.bits
    )
    at = first_row // OUTPUTS
    weight.scales[at : at + len(grid)] = grid


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers [out, in] int8, scales [out, groups] float32, zeros [out, groups] int16) of a packed weight."""
    sixteens, chunks = weight.packed.shape[:2]
    octets = weight.packed.contiguous().view(torch.uint8)
    shape = (sixteens, OUTPUTS, chunks * CHUNK)
    if weight.bits == 4:
        halves = torch.stack([octets & 15, octets >> 4])  # half first
        split = halves.view(2, sixteens, chunks, 8, 4, 4, 2, 2)  # half, 16s, chunk, row, pair, product, odd, eight
        numbers = split.permute(1, 0, 3, 2, 5, 7, 4, 6).reshape(shape).to(torch.int8) - 8
    else:
        split = octets.view(sixteens, chunks, 2, 8, 4, 2, 2, 2, 2)  # ..., piece, row, pair, product, eight, odd, half
        numbers = split.permute(0, 8, 3, 1, 2, 5, 6, 4, 7).reshape(shape).view(torch.int8)
    words = weight.scales.transpose(1, 2).reshape(sixteens * OUTPUTS, -1)[: weight.out_features]
    scales = (words & ~255).view(torch.float32)
    zeros = (words & 15) - 8 if weight.bits == 4 else (words & 255).to(torch.int8)
    return numbers.view(-1, chunks * CHUNK)[: weight.out_features, : weight.in_features], scales, zeros.to(torch.int16)


def _pack_numbers(numbers: Tensor, chunks: int, bits: int) -> Tensor:
    out, inputs = numbers.shape
    sixteens = -(-out // OUTPUTS)
    if (sixteens * OUTPUTS, chunks * CHUNK) != (out, inputs):
        numbers = torch.nn.functional.pad(numbers, (0, chunks * CHUNK - inputs, 0, sixteens * OUTPUTS - out))
    if bits == 4:
        # 16s, half, row, chunk, product, eight, pair, odd
        split = (numbers + 8).view(torch.uint8).view(sixteens, 2, 8, chunks, 4, 2, 4, 2)
        low, high = split.unbind(1)
        order = (low | high << 4).permute(0, 2, 1, 5, 3, 6, 4)  # 16s, chunk, row, pair, product, odd, eight
        octets = order.reshape(sixteens, chunks, 1, 32, 16)
    else:
        # 16s, half, row, chunk, piece, product, eight, pair, odd
        split = numbers.view(torch.uint8).view(sixteens, 2, 8, chunks, 2, 2, 2, 4, 2)
        order = split.permute(0, 3, 4, 2, 7, 5, 6, 8, 1)  # 16s, chunk, piece, row, pair, product, eight, odd, half
        octets = order.reshape(sixteens, chunks, 2, 32, 16)
    return octets.contiguous().view(torch.int32)


def _pack_grid(scales: Tensor, zeros: Tensor | None, num_groups: int, bits: int) -> Tensor:
    out = len(scales)
    words = (scales.float().contiguous().view(torch.int32) + 128) & ~255  # to the nearest
    if zeros is not None:
        words = words | (zeros.int() + 8 if bits == 4 else zeros.int() & 255)
    elif bits == 4:
        words = words | 8
    padding = (0, num_groups - words.shape[1], 0, -out % OUTPUTS)
    words = torch.nn.functional.pad(words, padding)
    return words.view(-1, OUTPUTS, num_groups).transpose(1, 2).contiguous()
