"""What a linear layer multiplies with, in the form in which it lies on the device.

A layer keeps its weight as `layer.weight` from `load` on and asks nothing of it but its products. So a calibration can
put a weight in its place that watches what comes in, or the one that it has just made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import ops
from engine.errors import UserError
from engine.layers.norm import RMSNorm
from engine.layers.placement import Placement
from engine.ops import Activations
from engine.quantization.formats.format import describe
from engine.quantization.weight import ALL, E4M3, QuantizedWeight, Scheme


class Weight(ABC):
    """A matrix W [out, in], or this rank's share of it.

    What makes its inputs may make them in the form in which it multiplies them: `inputs_of` and `rounds_to` say which.
    """

    @property
    def rounds_to(self) -> torch.dtype | None:
        """What inputs are rounded to, row by row, int8 or e4m3. None: they stay as they are."""
        return None

    def inputs_of(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> Activations:
        """norm.add(x, residual), for `apply`."""
        return norm.add(x, residual)

    @abstractmethod
    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        """x · Wᵀ + bias: x [rows, in], bias [out], result [rows, out]."""

    def apply_gated(
        self, x: Activations, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None = None
    ) -> Activations:
        """f(gate) · up of a W that is gate, then up: result [rows, out / 2], f = silu or gelu_tanh (kind).

        rounds_to: that of the weight which the result is for. It may come rounded.
        """
        return ops.gated_activation(self.apply(x, bias), kind)


@dataclass(frozen=True)
class PlainWeight(Weight):
    tensor: Tensor  # [out, in], in the model's type

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        return ops.linear(_plain(x), self.tensor, bias)

    def apply_gated(
        self, x: Activations, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None = None
    ) -> Tensor:
        return ops.gated_linear(_plain(x), self.tensor, bias, kind)


class FilledWeight(Weight):
    """A weight whose memory is taken first and filled later, some rows at a time, by any thread."""

    @abstractmethod
    def put(self, first_row: int, weight: QuantizedWeight) -> None:
        """Fill as many rows as `weight` has, from `first_row` on. It has the scheme, and the groups, of this one."""


@dataclass(frozen=True)
class GroupedWeight(FilledWeight):
    """Integers in groups of inputs, multiplied with inputs as they come."""

    grouped: ops.GroupedWeight
    order: Tensor | None  # [in] int32: the inputs, group by group; None: as they come

    def put(self, first_row: int, weight: QuantizedWeight) -> None:
        numbers = weight.numbers
        if weight.group_of is not None:
            numbers = numbers.index_select(1, _order(weight.group_of))
        scales, zeros = (_each_row(grid, weight.scheme, len(numbers)) for grid in (weight.scales, weight.zeros))
        assert scales is not None
        ops.put_grouped(self.grouped, first_row, numbers, scales, zeros)

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        return ops.grouped_linear(self._in_order(x), self.grouped, bias)

    def apply_gated(
        self, x: Activations, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None = None
    ) -> Tensor:
        return ops.grouped_gated_linear(self._in_order(x), self.grouped, bias, kind)

    def _in_order(self, x: Activations) -> Tensor:
        return _plain(x) if self.order is None else _plain(x).index_select(1, self.order)


@dataclass(frozen=True)
class RoundedWeight(FilledWeight):
    """int8 or e4m3 with a scale for each output, multiplied with inputs rounded to the same, token by token."""

    numbers: Tensor  # [out, in]
    scales: Tensor  # [out] float32

    def put(self, first_row: int, weight: QuantizedWeight) -> None:
        rows = slice(first_row, first_row + len(weight.numbers))
        self.numbers[rows].copy_(weight.numbers)
        scales = _each_row(weight.scales, weight.scheme, len(weight.numbers))
        assert scales is not None
        self.scales[rows].copy_(scales.squeeze(1))

    @property
    def rounds_to(self) -> torch.dtype:
        return self.numbers.dtype

    def inputs_of(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> Activations:
        return norm.add_rounded(x, residual, self.rounds_to)

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        return ops.rounded_linear(x, self.numbers, self.scales, bias)

    def apply_gated(
        self, x: Activations, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None = None
    ) -> Activations:
        return ops.rounded_gated_linear(x, self.numbers, self.scales, bias, kind, rounds_to)


@dataclass(frozen=True)
class BlockwiseWeight(FilledWeight):
    """e4m3 with a scale for each block, whose inputs may be rounded too."""

    numbers: Tensor  # [out, in] e4m3
    scales: Tensor  # [blocks of out, blocks of in] float32
    block: tuple[int, int]
    rounds_inputs: bool

    def put(self, first_row: int, weight: QuantizedWeight) -> None:
        self.numbers[first_row : first_row + len(weight.numbers)].copy_(weight.numbers)
        scales = weight.scales
        if weight.scheme.block[0] == ALL:
            scales = scales.expand(len(weight.numbers), -1)
        first = first_row // self.block[0]
        self.scales[first : first + len(scales)].copy_(scales)

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        return ops.blockwise_linear(_plain(x), self.numbers, self.scales, self.block, self.rounds_inputs, bias)


@dataclass(frozen=True)
class SplitWeight(Weight):
    """Rows of several kinds, one kind under the other: a product each."""

    parts: tuple[Weight, ...]
    sizes: tuple[int, ...]  # rows of each

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        biases = [None] * len(self.parts) if bias is None else bias.split(self.sizes)
        return torch.cat([part.apply(x, some) for part, some in zip(self.parts, biases, strict=True)], dim=1)


@dataclass(frozen=True)
class Part:
    """Some outputs of a layer: how their weight is stored, and how many there are on this rank."""

    name: str  # for errors
    rows: int
    scheme: Scheme | None  # None: plain numbers
    group_of: Tensor | None = None  # as of a QuantizedWeight


def empty_weight(
    parts: Sequence[Part], in_features: int, placement: Placement
) -> tuple[Weight, list[tuple[Weight, int]]]:
    """A layer's weight, its memory taken, and where each part goes: into which weight, from which row on.

    Parts make one product if they are of one kind. Raises UserError for a scheme that we cannot run.
    """
    if _are_of_one_kind(parts):
        whole = _empty(parts[0], sum(part.rows for part in parts), in_features, placement)
        firsts = [sum(part.rows for part in parts[:i]) for i in range(len(parts))]
        return whole, [(whole, first) for first in firsts]
    weights = [_empty(part, part.rows, in_features, placement) for part in parts]
    return SplitWeight(tuple(weights), tuple(part.rows for part in parts)), [(weight, 0) for weight in weights]


def _are_of_one_kind(parts: Sequence[Part]) -> bool:
    first, *others = parts
    if any(part.scheme != first.scheme or not _are_equal(part.group_of, first.group_of) for part in others):
        return False
    if first.scheme is None or not others:
        return True
    together = ops.ROWS_TOGETHER if _is_grouped(first.scheme) else first.scheme.block[0] or 1
    return all(part.rows % together == 0 for part in parts[:-1])


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _is_grouped(scheme: Scheme) -> bool:
    return scheme.kind == "int" and not scheme.rounds_inputs


def _empty(part: Part, rows: int, in_features: int, placement: Placement) -> Weight:
    scheme = part.scheme
    if scheme is None:
        return PlainWeight(placement.empty(rows, in_features))
    block_rows, block_columns = scheme.block[0] or 1, scheme.block[1] or in_features
    if _is_grouped(scheme):
        _check_groups(part, in_features, block_columns)
        grouped = ops.empty_grouped(
            rows, in_features, scheme.bits, block_columns, not scheme.is_symmetric, placement.empty
        )
        return GroupedWeight(grouped, None if part.group_of is None else _order(part.group_of).to(placement.device))
    if scheme.bits == 8 and scheme.is_symmetric and part.group_of is None:
        if scheme.rounds_inputs and block_rows == 1 and scheme.block[1] == ALL:
            numbers = placement.empty(rows, in_features, dtype=E4M3 if scheme.kind == "float" else torch.int8)
            return RoundedWeight(numbers, placement.empty(rows, dtype=torch.float32))
        if scheme.kind == "float":
            scales = (-(-rows // block_rows), -(-in_features // block_columns))
            return BlockwiseWeight(
                placement.empty(rows, in_features, dtype=E4M3),
                placement.empty(*scales, dtype=torch.float32),
                (block_rows, block_columns),
                scheme.rounds_inputs,
            )
    raise UserError(f"{part.name}: a weight of {describe(scheme)} cannot be run: quantize the model another way")


def _check_groups(part: Part, in_features: int, group_size: int) -> None:
    if in_features % group_size:
        raise UserError(
            f"{part.name}: {in_features:,} inputs do not make whole groups of {group_size}: "
            "quantize the model with a group size that divides them"
        )
    if part.group_of is not None:
        sizes = torch.bincount(part.group_of, minlength=in_features // group_size)
        if (sizes != group_size).any():
            raise UserError(
                f"{part.name}: its groups have {sizes.min().item()} to {sizes.max().item()} inputs, but its config says"
                f" {group_size}: the checkpoint is damaged, or its group size is a wrong one"
            )


def _plain(x: Activations) -> Tensor:
    assert isinstance(x, Tensor), f"{type(x).__name__} are inputs of another kind of weight"
    return x


def _order(group_of: Tensor) -> Tensor:
    """The inputs group by group, and in a group as they come, int32 [in]."""
    return group_of.argsort(stable=True).int()


def _each_row(grid: Tensor | None, scheme: Scheme, rows: int) -> Tensor | None:
    """The values of a grid for each of its weight's rows, [rows, blocks of in]."""
    if grid is None or scheme.block[0] == 1:
        return grid
    return grid.expand(rows, -1) if scheme.block[0] == ALL else grid.repeat_interleave(scheme.block[0], 0)[:rows]
