"""Who may come in: a bounded number of sequences, and nobody while the server loads or goes away.

What always holds: a sequence counted in is counted out when its reply ends, however it ends, so that `num_open == 0`
means that nothing is lost by stopping.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vcli.server.protocol import ApiError

RETRY_SOON_S = 1
RETRY_LATER_S = 5  # a model loads or a server restarts in the meantime


class Admission:
    """The door. Rejections are counted by reason, for the metrics."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.num_open = 0
        self.is_draining = False
        self.rejections: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self, num_sequences: int, max_running: int) -> Iterator[None]:
        """Hold places for the sequences of one call. Raises ApiError when there is no room."""
        limit = max_running + self.max_queue
        if self.is_draining:
            raise self.reject("draining", 503, "the server is shutting down", RETRY_LATER_S)
        if num_sequences > limit:
            raise ApiError(
                400, f"the request asks for {num_sequences:,} sequences and the server takes {limit:,} at once"
            )
        if self.num_open + num_sequences > limit:
            message = f"the queue is full ({self.num_open:,} open requests, at most {limit:,}): try again soon"
            raise self.reject("queue_full", 429, message, RETRY_SOON_S)
        self.num_open += num_sequences
        self._empty.clear()
        try:
            yield
        finally:
            self.num_open -= num_sequences
            if not self.num_open:
                self._empty.set()

    def reject(self, reason: str, status: int, message: str, retry_after_s: int) -> ApiError:
        self.rejections[reason] += 1
        return ApiError(status, message, code=reason, retry_after_s=retry_after_s)

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in any more and wait for the open requests. True when all of them finished in time."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
