"""Random draws that depend on nothing but (seed, position)."""

from torch import Tensor

from engine.ops.dispatch import body


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [rows, vocab_size] float32: argmax(logits + noise) draws from softmax(logits).

    seeds [rows] int64, positions [rows] (index of the token to draw in its sequence). Same numbers on every device.
    """
    return body(seeds).gumbel_noise(seeds, positions, vocab_size)
