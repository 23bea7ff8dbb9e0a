"""From token ids to vectors and from vectors to logits; the rows of the vocabulary are split over the ranks."""

import torch.nn.functional as F
from torch import Tensor

from engine import ops
from engine.checkpoint import Checkpoint
from engine.layers.placement import Placement
from engine.quantization.weight import QuantizedWeight

ROWS_AT_A_TIME = 1024  # of a quantized head, worked out in float32; a multiple of any block's rows


class VocabEmbedding:
    """A table [vocab_size, hidden_size], read by token on the way in and multiplied with on the way out."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        self.name, self.group = name, placement.group
        self.weight = placement.empty(placement.share(vocab_size), hidden_size)
        self.first = self.group.shard(vocab_size).start

    def load(self, ckpt: Checkpoint) -> None:
        if self.name != "lm_head" or ckpt.scheme_of(self.name) is None:  # a table of vectors is never quantized
            ckpt.read(f"{self.name}.weight", self.weight, dim=0, group=self.group)
            return
        vocab_size, hidden_size = len(self.weight) * self.group.size, self.weight.shape[1]
        ckpt.read_quantized(self.name, (vocab_size, hidden_size), self._fill, self.weight.device)

    def _fill(self, whole: QuantizedWeight) -> None:
        """A quantized head is worked out: its products are the logits, which want exact ones."""
        for first in range(0, len(self.weight), ROWS_AT_A_TIME):
            rows = slice(self.first + first, self.first + min(first + ROWS_AT_A_TIME, len(self.weight)))
            part = whole.cut(rows, slice(0, self.weight.shape[1])).dequantize()
            self.weight[first : first + len(part)].copy_(part)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The vectors [T, hidden_size] of tokens [T]. A rank gives zeros for rows that others hold."""
        wanted = token_ids - self.first
        row = wanted.clamp(0, len(self.weight) - 1)
        x = F.embedding(row, self.weight) * (row == wanted).unsqueeze(1)
        return self.group.all_reduce(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The products [n, vocab_size] float32 of hidden [n, hidden_size] with every row."""
        return self.group.all_gather(ops.logits(hidden, self.weight))
