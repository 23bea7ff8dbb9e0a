"""Where a layer's numbers live: their type, their device, and this process's place among the ranks that share them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.host_memory import HostMemory
from engine.parallel.groups import Group


@dataclass(frozen=True)
class Placement:
    """Built once for a model and handed to every layer."""

    dtype: torch.dtype
    device: torch.device
    group: Group
    host_memory: HostMemory = field(default_factory=HostMemory)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device.type == "cpu":
            return self.host_memory.empty(shape, dtype or self.dtype)
        # Zeros, as the model runs before its weights are there (see Worker), and what it computes is to be finite.
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def share(self, length: int) -> int:
        """This rank's part of a length that all ranks split evenly."""
        part = self.group.shard(length)
        return part.stop - part.start
