"""Server-sent events for the dashboard: a `history` first, then a `sample` and a `state` every second.

One task samples and encodes, whoever looks; a viewer costs a write a second, and one that reads slowly misses samples
instead of piling them up. With nobody looking the history goes on being kept, which takes a sample a second, and
nothing is encoded.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque

import msgspec
from starlette.types import Receive, Scope, Send

from vcli.server import streaming
from vcli.server.dashboard.sampler import Sample, Sampler
from vcli.server.frame import error_response
from vcli.server.protocol import ApiError

PERIOD_S = 1.0
INSPECTED_EVERY = 2  # samples: it costs the engine a millisecond
HISTORY = 300  # samples that a page starts with
MAX_VIEWERS = 64
RETRY_S = 10

log = logging.getLogger("vcli")


class Feed:
    """An ASGI application: the events of one server."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._history: deque[Sample] = deque(maxlen=HISTORY)
        self._latest = b""  # events of the last sample
        self._news = asyncio.Event()  # set at the next sample, and replaced
        self._is_closed = False
        self.num_viewers = 0

    async def run(self) -> None:
        """Sample until cancelled."""
        for number in itertools.count():
            await asyncio.sleep(PERIOD_S)
            try:
                sample = self._sampler.sample()
                self._history.append(sample)
                if self.num_viewers:
                    if number % INSPECTED_EVERY == 0:
                        await self._sampler.inspect()
                    self._latest = _event("sample", sample) + self._state()
            except Exception:  # nobody is served worse because the page is not
                log.exception("the dashboard could not be brought up to date")
            self._tell()

    def close(self) -> None:
        """The server ends: so do the streams."""
        self._is_closed = True
        self._tell()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await streaming.start_events(send, "dashboard")
            await streaming.send_events(send, b"", is_last=True)
            return
        if self.num_viewers >= MAX_VIEWERS:
            message = f"{MAX_VIEWERS} dashboards are open already: close one, or read /metrics"
            error = ApiError(429, message, code="too_many_viewers", retry_after_s=RETRY_S)
            await error_response(error, scope)(scope, receive, send)
            return
        gone = asyncio.create_task(_until_gone(receive))
        self.num_viewers += 1
        try:
            await self._follow(gone, send)
        finally:
            self.num_viewers -= 1
            gone.cancel()

    async def _follow(self, gone: "asyncio.Task[None]", send: Send) -> None:
        await self._sampler.inspect()
        await streaming.start_events(send, "dashboard")
        await streaming.send_events(send, _event("history", list(self._history)) + self._state())
        while not (self._is_closed or gone.done()):
            await self._news.wait()
            if not gone.done():
                await streaming.send_events(send, self._latest)
        with contextlib.suppress(OSError):
            await streaming.send_events(send, b"", is_last=True)

    def _state(self) -> bytes:
        return _event("state", self._sampler.state())

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
