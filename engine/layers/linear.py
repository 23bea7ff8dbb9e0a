"""Linear layers and their shards: by rows of the weight (outputs) or by columns (inputs).

A column-parallel layer followed by a row-parallel one needs one sum over the ranks, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.errors import UserError
from engine.layers.placement import Placement
from engine.layers.weights import FilledWeight, Part, PlainWeight, Weight, empty_weight
from engine.ops import Activations
from engine.quantization.weight import ALL, QuantizedWeight

Cut = tuple[slice, slice]  # rows and columns
Place = tuple[Weight, int]  # a weight, and its first row that is meant


class ColumnParallelLinear:
    """Projections of one input side by side as one product: y = x · Wᵀ + b, the rows of W split over the ranks.

    parts: name of each projection → its rows over all ranks. Some checkpoints hold them as one layer, `fused_name`.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], has_bias: bool, placement: Placement, fused_name: str = ""
    ) -> None:
        self.in_features, self.parts, self.fused_name, self.placement = in_features, parts, fused_name, placement
        self.shares = [placement.share(num_rows) for num_rows in parts.values()]
        self.weight: Weight  # from `load` on
        self.bias = placement.empty(sum(self.shares)) if has_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        stored = self._stored(is_fused=bool(self.fused_name) and ckpt.has_layer(self.fused_name))
        self.weight = load_weight(ckpt, stored, 0, self.placement)
        if self.bias is not None:
            for part, into in zip(stored, self.bias.split(self.shares), strict=True):
                ckpt.read(f"{part.name}.bias", into, dim=0, group=self.placement.group, fused=part.fused)

    def _stored(self, is_fused: bool) -> list[Stored]:
        if not is_fused:
            return [Stored(name, (rows, self.in_features), slice(0, rows)) for name, rows in self.parts.items()]
        ends = list(accumulate(self.parts.values()))
        starts = [0, *ends[:-1]]
        shape = (ends[-1], self.in_features)
        return [Stored(self.fused_name, shape, slice(a, b)) for a, b in zip(starts, ends, strict=True)]

    def __call__(self, x: Activations) -> Tensor:
        return self.weight.apply(x, self.bias)


class RowParallelLinear:
    """y = x · Wᵀ + b with the columns of W split over the ranks, each of which holds its part of x."""

    def __init__(self, name: str, in_features: int, out_features: int, has_bias: bool, placement: Placement) -> None:
        self.stored = Stored(name, (out_features, in_features), slice(0, out_features))
        self.placement = placement
        self.weight: Weight  # from `load` on
        adds_bias = has_bias and placement.group.rank == 0  # once in the sum
        self.bias = placement.empty(out_features) if adds_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        self.weight = load_weight(ckpt, [self.stored], 1, self.placement)
        if self.bias is not None:
            ckpt.read(f"{self.stored.name}.bias", self.bias)

    def __call__(self, x: Activations) -> Tensor:
        return self.placement.group.all_reduce(self.weight.apply(x, self.bias))


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint holds a projection: rows of a layer of its own, or of one that holds several."""

    name: str
    shape: tuple[int, int]  # of the layer's weight, [out, in]
    rows: slice

    @property
    def fused(self) -> tuple[int, int] | None:
        """As Checkpoint.read wants it."""
        return None if self.rows == slice(0, self.shape[0]) else (self.rows.start, self.shape[0])

    def cut(self, dim: int, placement: Placement) -> Cut:
        """This rank's rows and columns of the weight, if it is split along `dim`."""
        columns = slice(0, self.shape[1])
        if dim == 1:
            return self.rows, placement.group.shard(columns.stop)
        share = placement.group.shard(self.rows.stop - self.rows.start)
        return slice(self.rows.start + share.start, self.rows.start + share.stop), columns


def load_weight(ckpt: Checkpoint, stored: Sequence[Stored], dim: int, placement: Placement) -> Weight:
    """The weight of projections one under the other, or this rank's share of their rows (dim 0) or columns (dim 1).

    It has its numbers when the checkpoint is closed. Raises UserError.
    """
    cuts = [part.cut(dim, placement) for part in stored]
    parts = [_part(ckpt, part, cut) for part, cut in zip(stored, cuts, strict=True)]
    _, columns = cuts[0]
    weight, places = empty_weight(parts, columns.stop - columns.start, placement)
    for name, entries in groupby(zip(stored, cuts, places, strict=True), key=lambda entry: entry[0].name):
        wanted = list(entries)
        if ckpt.scheme_of(name) is not None:
            fill = partial(_fill, [(cut, place) for _, cut, place in wanted])
            ckpt.read_quantized(name, wanted[0][0].shape, fill, placement.device)
            continue
        for part, (rows, _), (into, first_row) in wanted:
            assert isinstance(into, PlainWeight), into
            tensor = into.tensor[first_row : first_row + rows.stop - rows.start]
            ckpt.read(f"{name}.weight", tensor, dim=dim, group=placement.group, fused=part.fused)
    return weight


def _part(ckpt: Checkpoint, stored: Stored, cut: Cut) -> Part:
    """What a rank's share is made of. Raises UserError if it would begin inside a block of numbers with one scale."""
    (rows, columns), name, scheme = cut, ckpt.prefix + stored.name, ckpt.scheme_of(stored.name)
    if scheme is None:
        return Part(name, rows.stop - rows.start, None)
    for what, part, side in zip(("output", "input"), cut, scheme.block, strict=True):
        if side != ALL and part.start % side:
            raise UserError(
                f"{name}: a share of it would begin at {what} {part.start:,}, inside a block of {side} that has one "
                "scale: use fewer ranks, or quantize the model with smaller blocks"
            )
    group_of = ckpt.group_of(stored.name, stored.shape[1])
    if group_of is not None and columns != slice(0, stored.shape[1]):
        raise UserError(f"{name}: its groups hold inputs from anywhere, so it cannot be split over ranks: use one rank")
    return Part(name, rows.stop - rows.start, scheme, group_of)


def _fill(wanted: Sequence[tuple[Cut, Place]], whole: QuantizedWeight) -> None:
    for cut, (into, first_row) in wanted:
        assert isinstance(into, FilledWeight), into
        into.put(first_row, whole.cut(*cut))
