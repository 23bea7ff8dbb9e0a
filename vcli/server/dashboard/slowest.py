"""The requests that took longest, in the parts that they waited for."""

import heapq
import itertools
import time
from collections.abc import Iterable

import msgspec

from engine.outputs import RequestTimings

KEPT_MIN = 10  # minutes
NUM_SHOWN = 12


class Waterfall(msgspec.Struct):
    """One request: where its time went. Nothing of what it said."""

    id: str
    arrived: float  # time.time()
    total_s: float  # so far, of one that is under way
    queue_s: float  # of one that has no token yet: in the queue or in its prefill
    prefill_s: float
    decode_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    outcome: str  # "waiting", "running", or how it ended: "stop", "length", "abort", "error"


class Slowest:
    """Keeps the slowest requests of each of the last minutes, so that a quiet hour forgets a bad one."""

    def __init__(self) -> None:
        self._minutes: dict[int, list[tuple[float, int, Waterfall]]] = {}  # of each a heap, the quickest first
        self._numbers = itertools.count()  # two that took as long are told apart by it

    def note(self, timings: RequestTimings) -> None:
        """Take in a request that has ended."""
        now = time.monotonic()
        entry = waterfall(timings, now, has_ended=True)
        minute = self._minutes.setdefault(int(now // 60), [])
        item = (entry.total_s, next(self._numbers), entry)
        if len(minute) < NUM_SHOWN:
            heapq.heappush(minute, item)
        else:
            heapq.heappushpop(minute, item)
        if len(self._minutes) > KEPT_MIN:
            del self._minutes[min(self._minutes)]

    def among(self, under_way: Iterable[RequestTimings]) -> list[Waterfall]:
        """The slowest of the last minutes and of those that are under way, the slowest first."""
        now = time.monotonic()
        for minute in [minute for minute in self._minutes if minute < now // 60 - KEPT_MIN]:
            del self._minutes[minute]
        ended = (entry for minute in self._minutes.values() for _, _, entry in minute)
        oldest = heapq.nsmallest(NUM_SHOWN, under_way, key=lambda timings: timings.arrival_time)
        entries = [*ended, *(waterfall(timings, now, has_ended=False) for timings in oldest)]
        return heapq.nlargest(NUM_SHOWN, entries, key=lambda entry: entry.total_s)


def waterfall(timings: RequestTimings, now: float, *, has_ended: bool) -> Waterfall:
    """now: time.monotonic()"""
    has_token = bool(timings.first_token_time)
    end = timings.last_token_time if has_ended and has_token else now
    first = timings.first_token_time if has_token else end
    scheduled = timings.scheduled_time or first
    return Waterfall(
        id=timings.request_id,
        arrived=round(time.time() - now + timings.arrival_time, 3),
        total_s=round(end - timings.arrival_time, 4),
        queue_s=round(scheduled - timings.arrival_time, 4),
        prefill_s=round(first - scheduled, 4),
        decode_s=round(end - first, 4),
        num_prompt_tokens=timings.num_prompt_tokens,
        num_cached_tokens=timings.num_cached_tokens,
        num_output_tokens=timings.num_output_tokens,
        outcome=timings.finish_reasons[-1] if has_ended else "running" if has_token else "waiting",
    )
