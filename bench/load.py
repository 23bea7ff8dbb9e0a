"""How requests are sent: so many at any time (closed loop), or at moments of their own (open loop).

Each function here is one client process's part of the load. Together they send what one alone would: in a closed loop
whoever is free takes the next request of all, in an open loop each process sends every n-th one at its moment.
"""

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from bench.client import LoadClient
from bench.metrics import RequestRecord
from bench.workloads import BenchRequest, begun, next_turn

LAG_PERIOD_S = 0.01
TIMER_RESOLUTION_S = 0.001  # event loops round their timers up to milliseconds: so much is no lag
GAPS_AT_ONCE = 1024
CLOSED_POLL_S = 0.5  # how soon who waits for a moment far away notices that no more is sent
OnRecord = Callable[[RequestRecord], None]


@dataclass(frozen=True)
class Load:
    """`concurrency` requests at any time, or `request_rate` a second whatever comes back; neither: as a trace says.

    It lasts until every request has been sent once or, with `duration_s`, so long, and then goes through the requests
    again and again.
    """

    concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0  # 1: Poisson arrivals; less: in bursts; more: more regular; inf: at constant gaps
    duration_s: float | None = None  # of what is measured: ramp-up comes before it, and ramp-down after it
    seed: int = 0


class Turnstile(Protocol):
    """Whom all client processes ask before they send a request."""

    def take(self) -> int | None:
        """The number of the next request (or conversation) to send, over all processes; None: no more."""

    @property
    def is_closed(self) -> bool:
        """Is the time over, for further turns too?"""


async def closed_loop(
    client: LoadClient,
    requests: Sequence[BenchRequest],
    num_users: int,
    turnstile: Turnstile,
    on_record: OnRecord,
    num_begun: int = 0,
) -> None:
    """Keep `num_users` requests under way as long as there are any.

    num_begun: of the first requests of all processes, which are sent as if they had been under way for a while.
    """

    async def user() -> None:
        while (index := turnstile.take()) is not None:
            request = nth_request(requests, index)
            if index < num_begun:
                request = begun(request, index, num_begun)
            await converse(client, request, turnstile, on_record)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_users):
            group.create_task(user())


async def open_loop(
    client: LoadClient,
    requests: Sequence[BenchRequest],
    moments: Iterator[tuple[int, float]],
    turnstile: Turnstile,
    lag: "LagMeter",
    on_record: OnRecord,
) -> None:
    """Send each request of `moments` (its number, and when by the client's clock), whatever comes back."""
    async with asyncio.TaskGroup() as group:
        for index, moment in moments:
            await _until(moment, client, turnstile)
            if turnstile.take() is None:
                return
            if not math.isinf(moment):  # of all at once none is late
                lag.note(client.clock() - moment)
            group.create_task(converse(client, nth_request(requests, index), turnstile, on_record))


async def _until(moment: float, client: LoadClient, turnstile: Turnstile) -> None:
    """Wait for the moment, but no longer than anything is sent; others have their turn even when it is past."""
    await asyncio.sleep(0)
    while (left := moment - client.clock()) > 0 and not turnstile.is_closed:
        await asyncio.sleep(min(left, CLOSED_POLL_S))


async def converse(client: LoadClient, request: BenchRequest, turnstile: Turnstile, on_record: OnRecord) -> None:
    """Send a request and, as soon as it is answered, its next turns; a failure ends a conversation."""
    following: BenchRequest | None = request
    while following is not None:
        record, answer = await client.exchange(following)
        is_over = bool(record.error) or turnstile.is_closed
        following = None if is_over else next_turn(following, answer)
        record.ends_conversation = following is None
        on_record(record)


def nth_request(requests: Sequence[BenchRequest], index: int) -> BenchRequest:
    """The list gone through again and again; a repeated request is not to be found in the server's prefix cache."""
    repeat, position = divmod(index, len(requests))
    return replace(requests[position], repeat=repeat) if repeat else requests[position]


def arrivals(load: Load, requests: Sequence[BenchRequest]) -> Iterator[float]:
    """Seconds from the start at which requests are sent: of a trace its own, else endless and drawn from the seed."""
    if load.request_rate is None:
        return iter([request.arrival or 0.0 for request in requests])
    return itertools.accumulate(_gaps(load.request_rate, load.burstiness, load.seed))


def _gaps(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Gaps between arrivals, gamma-distributed with mean 1 / rate and the shape `burstiness`, as vLLM draws them."""
    if math.isinf(burstiness) or math.isinf(rate):
        return itertools.repeat(1 / rate)
    rng = np.random.default_rng(seed)
    draws = (rng.gamma(burstiness, 1 / burstiness, GAPS_AT_ONCE).tolist() for _ in itertools.count())
    return (gap / rate for gap in itertools.chain.from_iterable(draws))


@dataclass
class LagMeter:
    """How late an event loop wakes up, and how much of a core its process uses."""

    lags: list[float] = field(default_factory=list)  # seconds; one each LAG_PERIOD_S
    cpu_share: float = 0.0  # of one core

    def note(self, lag: float) -> None:
        self.lags.append(max(0.0, lag - TIMER_RESOLUTION_S))

    def percentile(self, percentile: float) -> float:
        return float(np.percentile(self.lags, percentile)) if self.lags else 0.0

    @property
    def mean(self) -> float:
        return sum(self.lags) / len(self.lags) if self.lags else 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            self.cpu_share = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self.note(time.perf_counter() - due)
