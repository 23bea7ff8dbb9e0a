"""A group of ranks and its verbs. A group of one does nothing, so that layers need no branch on their size."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Group:
    """This process's place among the ranks that share each layer."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)

    def shard(self, length: int) -> slice:
        """This rank's part of a dimension. Raises ValueError if the group's size does not divide it."""
        if length % self.size:
            raise ValueError(f"{length} rows cannot be split evenly over {self.size} ranks")
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the group, on every rank."""
        assert self.size == 1, "groups of several ranks come with tensor parallelism"
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The parts of all ranks side by side along the last dimension."""
        assert self.size == 1, "groups of several ranks come with tensor parallelism"
        return x
