"""Who may come in: a bounded number of sequences and of prompt tokens that wait, nobody whose answer would come too
late, and nobody while the server loads or goes away.

What always holds: a sequence counted in is counted out when its reply ends, however it ends, so that `num_open == 0`
means that nothing is lost by stopping. Who is turned away is told so before its prompt is tokenized, where that can be
known, and when to come again.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.async_engine import AsyncEngine
from engine.outputs import RequestTimings
from engine.request_stream import RequestStream
from vcli.server.forecast import Forecast
from vcli.server.protocol import ApiError

RETRY_SOON_S = 1
RETRY_LATER_S = 5  # a model loads or a server restarts in the meantime
LONGEST_RETRY_S = 600
MARGIN = 1.25  # things take longer than was foretold about as often as not, and an answer that is late is all in vain


@dataclass
class Place:
    """What a call holds while it is in: room for its sequences, and the time that it has."""

    admission: "Admission"
    max_tokens: int | None  # of each sequence
    num_open: int  # sequences when it came, its own among them
    num_ends: int  # of other sequences that it has to wait for
    arrival_time: float  # time.monotonic()
    deadline_s: float | None  # from then on, for the whole answer

    def take_prompts(self, prompt_lengths: Sequence[int]) -> None:
        """Say how long the prompts are. Raises ApiError when there is no room for them, or no time."""
        self.admission._check_tokens(sum(prompt_lengths))
        self.admission._check_deadline(self, max(prompt_lengths, default=0))

    @contextmanager
    def limit_time(self, streams: Sequence[RequestStream]) -> Iterator[None]:
        """While the block runs, end the streams as soon as their answer can no longer be there in time."""
        if self.deadline_s is None:
            yield
            return
        late = self.arrival_time + self.deadline_s - time.monotonic()
        decode_s = self.admission.forecast.decode_s(self.max_tokens)
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(max(late, 0.0), self._end, streams, False)]
        if self.num_ends:
            timers.append(loop.call_later(max(late - decode_s, 0.0), self._end, streams, True))
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def _end(self, streams: Sequence[RequestStream], only_waiting: bool) -> None:
        running = [stream for stream in streams if not stream.is_finished]
        if running and not (only_waiting and any(stream.has_started for stream in running)):
            error = self.admission.reject_late(self)
            for stream in running:
                stream.abort(error)


class Admission:
    """The door. Rejections are counted by reason, for the metrics."""

    def __init__(self, engine: AsyncEngine, max_queue: int, max_queue_tokens: int) -> None:
        self.max_queue = max_queue
        self.max_queue_tokens = max_queue_tokens
        self.num_open = 0
        self.is_draining = False
        self.rejections: Counter[str] = Counter()
        self.forecast = Forecast()
        self._engine = engine
        self._open_by_priority: Counter[int] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()
        engine.on_finish.append(self._learn)

    @contextmanager
    def enter(
        self,
        num_sequences: int,
        *,
        max_running: int,
        max_tokens: int | None = None,
        priority: int = 0,
        arrival_time: float = 0.0,
        deadline_s: float | None = None,
    ) -> Iterator[Place]:
        """Hold places for the sequences of one call. Raises ApiError when there is no room, or no time.

        max_running: sequences that run in one step at most. max_tokens: that a sequence may give. deadline_s: from
        arrival_time (by time.monotonic()) to the end of the answer.
        """
        limit = max_running + self.max_queue
        if self.is_draining:
            raise self.reject("draining", 503, "the server is shutting down", RETRY_LATER_S)
        if num_sequences > limit:
            raise ApiError(
                400, f"the request asks for {num_sequences:,} sequences and the server takes {limit:,} at once"
            )
        if self.num_open + num_sequences > limit:
            message = f"the queue is full ({self.num_open:,} open requests, at most {limit:,})"
            raise self._reject_full("queue_full", message)
        num_ends = self._num_ends(num_sequences, priority)
        place = Place(self, max_tokens, self.num_open + num_sequences, num_ends, arrival_time, deadline_s)
        self._check_deadline(place, 0)
        self.num_open += num_sequences
        self._open_by_priority[priority] += num_sequences
        self._empty.clear()
        try:
            yield place
        finally:
            self.num_open -= num_sequences
            self._open_by_priority[priority] -= num_sequences
            if not self._open_by_priority[priority]:
                del self._open_by_priority[priority]
            if not self.num_open:
                self._empty.set()

    def queue_s(self) -> float:
        """How long a request that came now would wait for its place in the batch."""
        return self.forecast.wait_s(self._num_ends(1, 0), self._num_places)

    def utilization(self) -> float:
        """Open sequences as a share of those that can run at once: above 1 where some must wait.

        At once can run as many as there are places or, if those that run fill the KV cache before, as many as they.
        """
        stats, num_places = self._engine.stats, float(self._num_places)
        if stats.num_running and stats.num_blocks_used:
            num_places = min(num_places, stats.num_running * stats.num_blocks / stats.num_blocks_used)
        return self.num_open / num_places

    def reject(self, reason: str, status: int, message: str, retry_after_s: int) -> ApiError:
        self.rejections[reason] += 1
        return ApiError(status, message, code=reason, retry_after_s=retry_after_s)

    def reject_late(self, place: Place) -> ApiError:
        """For a call that was let in and is not done in time."""
        message = f"the answer cannot be there within the {place.deadline_s:g} s that the request gives"
        return self._put_off("deadline_exceeded", 503, message, self._half_of_the_queue_s())

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in any more and wait for the open requests. True when all of them finished in time."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _check_tokens(self, num_tokens: int) -> None:
        num_waiting = self._engine.num_waiting_tokens
        if num_waiting and num_waiting + num_tokens > self.max_queue_tokens:
            message = f"the queue is full ({num_waiting:,} prompt tokens wait, at most {self.max_queue_tokens:,} may)"
            raise self._reject_full("queue_tokens_full", message)

    def _check_deadline(self, place: Place, num_prompt_tokens: int) -> None:
        """Raises ApiError for an answer that would come too late."""
        if place.deadline_s is None:
            return
        wait_s = self.forecast.wait_s(place.num_ends, self._num_places)
        needed_s = MARGIN * (wait_s + self.forecast.answer_s(num_prompt_tokens, place.max_tokens, place.num_open))
        left_s = place.arrival_time + place.deadline_s - time.monotonic()
        if needed_s > left_s:
            message = f"the answer would take about {needed_s:.2g} s and the request gives {place.deadline_s:g} s"
            raise self._put_off("deadline_unreachable", 429, message, needed_s - left_s)

    def _reject_full(self, reason: str, message: str) -> ApiError:
        return self._put_off(reason, 429, message, self._half_of_the_queue_s())

    def _put_off(self, reason: str, status: int, message: str, wait_s: float) -> ApiError:
        retry_after_s = min(max(math.ceil(wait_s), RETRY_SOON_S), LONGEST_RETRY_S)
        return self.reject(reason, status, f"{message}: try again in {retry_after_s} s", retry_after_s)

    def _half_of_the_queue_s(self) -> float:
        """In which, as it goes now, half of those that wait will have started: then there is room again."""
        return self.forecast.wait_s(self._num_ends(0, None), self._num_places) / 2

    def _num_ends(self, num_sequences: int, priority: int | None) -> int:
        """How many sequences must end until new ones of this priority (None: the last of all) have started."""
        counts = self._open_by_priority.items()
        num_before = sum(count for each, count in counts if priority is None or each <= priority)
        stats = self._engine.stats
        num_running = stats.num_running if stats.num_waiting else self._num_places
        return max(num_before + num_sequences - num_running, 0)

    @property
    def _num_places(self) -> int:
        return self._engine.ready.max_num_seqs if self._engine.ready else 1

    def _learn(self, timings: RequestTimings) -> None:
        stats = self._engine.stats
        self.forecast.note(timings, stats.num_running, others_wait=stats.num_waiting > 0)
