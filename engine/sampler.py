"""What the runner must know of how a running request samples, and the log probabilities beside its tokens.

Tokens are drawn by `ops.sample`, from parameters that lie on the device.
"""

from dataclasses import dataclass

from torch import Tensor

from engine import ops
from engine.sampling_params import SamplingParams


@dataclass
class SamplingRow:
    """What the host keeps of how a running request samples."""

    params: SamplingParams
    num_prompt_tokens: int
    stop_token_ids: list[int]  # tokens that min_tokens forbids for a while

    @property
    def changes_logits(self) -> bool:
        return bool(self.params.logit_bias or self.stop_token_ids) or self.params.has_penalties or self.params.has_mask

    @property
    def takes_best(self) -> bool:
        """It takes the most likely token of the logits as they are."""
        return self.params.is_greedy and not self.changes_logits


@dataclass
class Logprobs:
    """Log probabilities of n tokens and of the best k of their positions, before any parameter changed them."""

    chosen: Tensor  # [n] float32
    rank: Tensor  # [n] 1 is the most likely
    top_values: Tensor  # [n, k] float32
    top_ids: Tensor  # [n, k]


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Log probabilities of the given tokens and of the num_top best.   logits [n, vocab] float32, token_ids [n]"""
    return Logprobs(*ops.logprobs(logits, token_ids, num_top))
