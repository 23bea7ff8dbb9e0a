"""From token ids to vectors and from vectors to logits; the rows of the vocabulary are split over the ranks."""

import torch.nn.functional as F
from torch import Tensor

from engine import ops
from engine.checkpoint import Checkpoint
from engine.layers.placement import Placement


class VocabEmbedding:
    """A table [vocab_size, hidden_size], read by token on the way in and multiplied with on the way out."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        self.name, self.group = name, placement.group
        self.weight = placement.empty(placement.share(vocab_size), hidden_size)
        self.first = self.group.shard(vocab_size).start

    def load(self, ckpt: Checkpoint) -> None:
        ckpt.read(f"{self.name}.weight", self.weight, dim=0, group=self.group)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The vectors [T, hidden_size] of tokens [T]. A rank gives zeros for rows that others hold."""
        wanted = token_ids - self.first
        row = wanted.clamp(0, len(self.weight) - 1)
        x = F.embedding(row, self.weight) * (row == wanted).unsqueeze(1)
        return self.group.all_reduce(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The products [n, vocab_size] float32 of hidden [n, hidden_size] with every row."""
        return self.group.all_gather(ops.logits(hidden, self.weight))
