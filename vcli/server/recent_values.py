"""Percentiles of what was seen lately, cheap enough to be told of every token.

A value is counted in a bucket of 3.5 % width, of the second that is under way; a second leaves as a whole when it is
older than the window. What always holds: the counts of the window are the sum of those of its seconds.
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import Sequence

WIDTH = 20  # buckets of an octave
WINDOW = 30  # ticks, and so seconds
QUANTILES = (0.5, 0.95, 0.99)


class RecentValues:
    """Positive numbers of the last `window` ticks."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._ticks: deque[Counter[int]] = deque([Counter()])
        self._sum: Counter[int] = Counter()  # of the ticks that have ended

    def add(self, value: float, times: int = 1) -> None:
        """Count a value. Costs under a microsecond."""
        self._ticks[-1][math.floor(math.log2(value) * WIDTH) if value > 0 else -(10**6)] += times

    def tick(self) -> None:
        """A second has ended: what came in it is in the percentiles from now on."""
        self._sum.update(self._ticks[-1])
        self._ticks.append(Counter())
        if len(self._ticks) > self._window + 1:
            self._sum -= self._ticks.popleft()  # and drops what has come to zero

    def quantiles(self, shares: Sequence[float] = QUANTILES) -> list[float] | None:
        """The values below which these shares of the window lie, each within 2 %; None where nothing was seen."""
        if not self._sum:
            return None
        buckets = sorted(self._sum)
        counts = list(itertools.accumulate(self._sum[bucket] for bucket in buckets))
        return [_middle(next(b for b, n in zip(buckets, counts, strict=True) if n >= q * counts[-1])) for q in shares]


def _middle(bucket: int) -> float:
    return 2 ** ((bucket + 0.5) / WIDTH)
