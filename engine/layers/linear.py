"""Linear layers and their shards: by rows of the weight (outputs) or by columns (inputs).

A column-parallel layer followed by a row-parallel one needs one sum over the ranks, at the end.
"""

from torch import Tensor

from engine import ops
from engine.checkpoint import Checkpoint
from engine.layers.placement import Placement


class ColumnParallelLinear:
    """Projections of one input side by side as one product: y = x · Wᵀ + b, the rows of W split over the ranks.

    parts: name of each projection → its rows over all ranks. Some checkpoints hold them as one tensor, `fused_name`.
    """

    def __init__(
        self, in_features: int, parts: dict[str, int], has_bias: bool, placement: Placement, fused_name: str = ""
    ) -> None:
        self.parts, self.fused_name, self.group = parts, fused_name, placement.group
        self.shares = [placement.share(num_rows) for num_rows in parts.values()]
        self.weight = placement.empty(sum(self.shares), in_features)
        self.bias = placement.empty(sum(self.shares)) if has_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None:
                self._load(ckpt, kind, tensor)

    def _load(self, ckpt: Checkpoint, kind: str, tensor: Tensor) -> None:
        is_fused = self.fused_name and ckpt.has(f"{self.fused_name}.{kind}")
        first, num_rows = 0, sum(self.parts.values())
        for (name, length), into in zip(self.parts.items(), tensor.split(self.shares), strict=True):
            if is_fused:
                ckpt.read(f"{self.fused_name}.{kind}", into, dim=0, group=self.group, fused=(first, num_rows))
            else:
                ckpt.read(f"{name}.{kind}", into, dim=0, group=self.group)
            first += length

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RowParallelLinear:
    """y = x · Wᵀ + b with the columns of W split over the ranks, each of which holds its part of x."""

    def __init__(self, name: str, in_features: int, out_features: int, has_bias: bool, placement: Placement) -> None:
        self.name, self.group = name, placement.group
        self.weight = placement.empty(out_features, placement.share(in_features))
        adds_bias = has_bias and self.group.rank == 0  # once in the sum
        self.bias = placement.empty(out_features) if adds_bias else None

    def load(self, ckpt: Checkpoint) -> None:
        ckpt.read(f"{self.name}.weight", self.weight, dim=1, group=self.group)
        if self.bias is not None:
            ckpt.read(f"{self.name}.bias", self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(ops.linear(x, self.weight, self.bias))
