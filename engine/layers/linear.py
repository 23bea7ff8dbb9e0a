"""Linear layers and their shards: by rows of the weight (outputs) or by columns (inputs).

A column-parallel layer followed by a row-parallel one needs one sum over the ranks, at the end.
"""

from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.layers.placement import Placement
from engine.layers.weights import PlainWeight, Weight


class ColumnParallelLinear:
    """Projections of one input side by side as one product: y = x · Wᵀ + b, the rows of W split over the ranks.

    parts: name of each projection → its rows over all ranks. Some checkpoints hold them as one tensor, `fused_name`.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], has_bias: bool, placement: Placement, fused_name: str = ""
    ) -> None:
        self.in_features, self.parts, self.fused_name, self.placement = in_features, parts, fused_name, placement
        self.shares = [placement.share(num_rows) for num_rows in parts.values()]
        self.weight: Weight  # from `load` on
        self.bias = placement.empty(sum(self.shares)) if has_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        tensor = self.placement.empty(sum(self.shares), self.in_features)
        self.weight = PlainWeight(tensor)
        self._read(ckpt, "weight", tensor)
        if self.bias is not None:
            self._read(ckpt, "bias", self.bias)

    def _read(self, ckpt: Checkpoint, kind: str, tensor: Tensor) -> None:
        is_fused = self.fused_name and ckpt.has(f"{self.fused_name}.{kind}")
        first, num_rows = 0, sum(self.parts.values())
        for (name, length), into in zip(self.parts.items(), tensor.split(self.shares), strict=True):
            if is_fused:
                ckpt.read(f"{self.fused_name}.{kind}", into, dim=0, group=self.placement.group, fused=(first, num_rows))
            else:
                ckpt.read(f"{name}.{kind}", into, dim=0, group=self.placement.group)
            first += length

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.apply(x, self.bias)


class RowParallelLinear:
    """y = x · Wᵀ + b with the columns of W split over the ranks, each of which holds its part of x."""

    def __init__(self, name: str, in_features: int, out_features: int, has_bias: bool, placement: Placement) -> None:
        self.name, self.placement = name, placement
        self.shape = (out_features, placement.share(in_features))
        self.weight: Weight  # from `load` on
        adds_bias = has_bias and placement.group.rank == 0  # once in the sum
        self.bias = placement.empty(out_features) if adds_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        tensor = self.placement.empty(*self.shape)
        self.weight = PlainWeight(tensor)
        ckpt.read(f"{self.name}.weight", tensor, dim=1, group=self.placement.group)
        if self.bias is not None:
            ckpt.read(f"{self.name}.bias", self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.placement.group.all_reduce(self.weight.apply(x, self.bias))
