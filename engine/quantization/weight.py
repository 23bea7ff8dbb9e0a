"""A linear layer's weight on a grid: small numbers, and the scales that bring them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
ALL = 0  # as a side of a scheme's block: the whole weight, however many rows or columns it has


@dataclass(frozen=True)
class Scheme:
    """What the numbers of a weight [out, in] are rounded to: q of `bits` bits, W ≈ (q - zero) · scale.

    `block`: rows and columns that share a scale. (1, 64) are groups of 64 inputs, (1, ALL) one scale for each output,
    (128, 128) squares, (ALL, ALL) one scale in all.
    """

    kind: Literal["int", "float"]  # float: e4m3, 8 bits
    bits: Literal[4, 8]
    block: tuple[int, int]
    is_symmetric: bool = True  # no zeros
    rounds_inputs: bool = False  # at run time, each token to the same kind, with a scale of its own

    @property
    def lowest(self) -> int:
        """Of the integers that a weight is made of; the highest is -1 - lowest."""
        return -(1 << (self.bits - 1))

    def grid_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of the scales, and of the zeros, of a weight. The last block of a side may be a shorter one."""
        rows, columns = self.block
        return (1 if rows == ALL else -(-out_features // rows), 1 if columns == ALL else -(-in_features // columns))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] as its scheme keeps it, nothing packed, on any device.

    Symmetric integers have no zeros. With `group_of` the columns of scales and zeros are those of each input's group;
    without, an input's group is its place divided by the block's columns.
    """

    scheme: Scheme
    numbers: Tensor  # [out, in], int8 or e4m3
    scales: Tensor  # grid_shape, any floating type
    zeros: Tensor | None = None  # grid_shape, int16: what stands for 0, from `lowest` on up to as much above 0
    group_of: Tensor | None = None  # [in] int32

    def dequantize(self) -> Tensor:
        """The weight as float32, [out, in]."""
        wide = self.numbers.float()
        if self.zeros is not None:
            wide = wide - self._expand(self.zeros)
        return wide * self._expand(self.scales)

    def cut(self, rows: slice, columns: slice) -> QuantizedWeight:
        """Some rows and columns, views of these. They begin where blocks do; mixed groups cannot be cut by columns."""
        lines, places = (_blocks_of(part, side) for part, side in zip((rows, columns), self.scheme.block, strict=True))
        assert self.group_of is None or columns == slice(0, self.numbers.shape[1]), columns
        zeros = None if self.zeros is None else self.zeros[lines, places]
        return QuantizedWeight(
            self.scheme, self.numbers[rows, columns], self.scales[lines, places], zeros, self.group_of
        )

    def _expand(self, grid: Tensor) -> Tensor:
        """Each weight's own value of the grid, [out or 1, in or 1] float32."""
        rows, columns = self.scheme.block
        out_features, in_features = self.numbers.shape
        grid = grid.float()
        if rows not in (1, ALL):
            grid = grid.repeat_interleave(rows, 0)[:out_features]
        if self.group_of is not None:
            return grid.index_select(1, self.group_of.long())
        return grid if columns == ALL else grid.repeat_interleave(columns, 1)[:, :in_features]


def _blocks_of(part: slice, side: int) -> slice:
    """The blocks, `side` long, of a part of a dimension."""
    assert side == ALL or part.start % side == 0, f"{part} begins inside a block of {side}"
    return slice(None) if side == ALL else slice(part.start // side, -(-part.stop // side))


def round_to_grid(weight: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> QuantizedWeight:
    """Each number of a weight [out, in] rounded to the nearest on a grid that is there already."""
    empty = QuantizedWeight(scheme, torch.empty_like(weight), scales, zeros)
    steps = weight.float() / empty._expand(scales)
    if scheme.kind == "float":
        return QuantizedWeight(scheme, steps.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scales)
    if zeros is not None:
        steps = steps + empty._expand(zeros)
    numbers = steps.round().clamp(scheme.lowest, -1 - scheme.lowest).to(torch.int8)
    return QuantizedWeight(scheme, numbers, scales, zeros)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """A weight [out, in] on the grid that its smallest and largest number in each block span."""
    low, high = _blockwise(weight, scheme)
    if scheme.kind == "float":
        return round_to_grid(weight, scheme, _at_least_tiny(torch.maximum(-low, high) / E4M3_MAX))
    if scheme.is_symmetric:
        return round_to_grid(weight, scheme, _at_least_tiny(torch.maximum(-low, high) / (-0.5 - scheme.lowest)))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _at_least_tiny((high - low) / (2**scheme.bits - 1))
    zeros = (scheme.lowest - low / scales).round().clamp(scheme.lowest, -1 - scheme.lowest).to(torch.int16)
    return round_to_grid(weight, scheme, scales, zeros)


def _blockwise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each block, in float32."""
    rows, columns = (side or length for side, length in zip(scheme.block, weight.shape, strict=True))
    out_blocks, in_blocks = scheme.grid_shape(*weight.shape)
    # Blocks that stick out are filled with the weight's first number of theirs, which changes no extreme.
    row_index = torch.arange(out_blocks * rows, device=weight.device).clamp(max=weight.shape[0] - 1)
    column_index = torch.arange(in_blocks * columns, device=weight.device).clamp(max=weight.shape[1] - 1)
    padded = weight.float()[row_index][:, column_index]
    blocks = padded.view(out_blocks, rows, in_blocks, columns)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def _at_least_tiny(scales: Tensor) -> Tensor:
    """A block of zeros has a scale too."""
    return scales.clamp(min=torch.finfo(torch.float16).tiny)
