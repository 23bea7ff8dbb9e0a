"""How much of the KV cache the running requests will come to need.

They grow by a token a step, each until its own end, and whoever ends gives its blocks back: the peak is not the sum of
their final sizes. It is reached just before one of them ends, so it is enough to look there (Gong et al., "Past-Future
Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025). How long answers become is learned from those that ended.
"""

from collections.abc import Iterable

from engine.recent import RecentMean

FIRST_GUESS = 256  # tokens of an answer, before any has ended
LONGER_STILL = 0.05  # an answer longer than others goes on for so large a share of what it has, no longer than others
ROOM = 0.9  # of the peak: with less there are more preemptions, with more the cache is less full; 0.9 gave most tokens


class AnswerLength:
    """What is known of the number of tokens in an answer."""

    def __init__(self) -> None:
        self._seen = RecentMean()

    def add(self, num_tokens: int) -> None:
        """Learn from an answer that has ended by itself."""
        self._seen.add(num_tokens)

    @property
    def mean(self) -> float:
        return self._seen.value if self._seen.count else FIRST_GUESS

    @property
    def longest(self) -> float:
        """No answer is expected to get more tokens than that."""
        return max(self.mean, 1.0)

    def remaining(self, num_tokens: int, max_tokens: int) -> int:
        """Tokens that one of num_tokens so far will still get, of max_tokens at most in all."""
        still = min(LONGER_STILL * num_tokens, self.mean)
        return min(int(max(self.mean - num_tokens, still, 1.0)), max_tokens - num_tokens)


def room_to_grow(requests: Iterable[tuple[int, int]], block_size: int) -> int:
    """Blocks to keep free for requests; see `peak_growth`."""
    return int(ROOM * peak_growth(requests, block_size))


def peak_growth(requests: Iterable[tuple[int, int]], block_size: int) -> int:
    """The most blocks that requests will own together beyond those that they own now.

    requests: of each the blocks that it gives back at its end, and the tokens that it will still get.
    """
    ends = sorted((num_tokens, num_blocks) for num_blocks, num_tokens in requests)
    num_left, num_freed, peak = len(ends), 0, 0
    for num_tokens, num_blocks in ends:
        peak = max(peak, -(-num_left * num_tokens // block_size) - num_freed)
        num_left -= 1
        num_freed += num_blocks
    return peak
