"""Event streams that outlive their connections: a client that lost its own comes back and reads on.

A client that asks for it (`X-Reconnect-Grace-Ms`) gets events with ids, and sends the last one that it has seen as
`Last-Event-ID` with any request to the same path. Its reply is made by a task of its own, which speaks ASGI as if to
the client: what it sends is numbered and kept here for whoever follows, and that the client is gone it hears when
nobody has followed for the grace time. What always holds: every event that the last follower has not been sent is kept,
and KEPT_BYTES of those before, since what was sent may not have arrived.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Scope, Send

from vcli.server import streaming
from vcli.server.protocol import ApiError

MAX_GRACE_MS = 60_000
KEPT_BYTES = 1 << 20
MAX_NUMBER_DIGITS = 9

log = logging.getLogger("vcli")


def grace_s(scope: Scope) -> float:
    """How long the client may be away, as it says; 0 if it says nothing. Raises ApiError for no such number of ms."""
    name = "X-Reconnect-Grace-Ms"
    value = _header(scope, name)
    if value is None:
        return 0.0
    if not (value.isascii() and value.isdigit() and len(value) <= MAX_NUMBER_DIGITS and int(value) <= MAX_GRACE_MS):
        raise ApiError(400, f"{name} must be a whole number up to {MAX_GRACE_MS:,}, got {value[:40]!r}")
    return int(value) / 1000


def last_event_id(scope: Scope) -> str | None:
    """The last event that a client has seen that reads on."""
    return _header(scope, "Last-Event-ID")


def _header(scope: Scope, name: str) -> str | None:
    key = name.lower().encode()
    return next((value.decode("latin-1") for each, value in scope["headers"] if each == key), None)


class Replays:
    """The streams of a server that can be read on, by the ids of their replies."""

    def __init__(self) -> None:
        self._by_id: dict[str, Replay] = {}

    def start(self, make: Callable[[Receive, Send], Awaitable[None]], grace_s: float, owner: str) -> "Replay":
        """A stream that `make` sends. owner: the tenant, who alone may follow it."""
        return Replay(make, grace_s, owner, self._by_id)

    def find(self, event_id: str, owner: str) -> "tuple[Replay, int]":
        """A stream, and the number of the event after this one. Raises ApiError if it is not there (any more)."""
        name, _, number = event_id.rpartition("-")
        replay = self._by_id.get(name)
        is_number = number.isascii() and number.isdigit() and len(number) <= MAX_NUMBER_DIGITS
        if replay is None or replay.owner != owner or not is_number or not replay.has_after(int(number)):
            message = f"no stream goes on after event {event_id[:100]!r}: it was not sent, or its grace time is over"
            raise ApiError(404, message, code="stream_gone")
        return replay, int(number) + 1


class Replay:
    """One reply's events, and whoever follows them: one connection at a time, the latest."""

    def __init__(
        self,
        make: Callable[[Receive, Send], Awaitable[None]],
        grace_s: float,
        owner: str,
        by_id: "dict[str, Replay]",
    ) -> None:
        self.owner = owner
        self._grace_s = grace_s
        self._by_id = by_id
        self._id = ""
        self._head: Message | None = None
        self._events: list[bytes] = []
        self._first = 1  # number of the first one that is kept
        self._num_bytes = 0  # of the kept ones
        self._num_sent = 0  # to followers
        self._is_complete = False
        self._follower: object | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._abandoned = asyncio.Event()
        self._task = asyncio.ensure_future(make(self._until_abandoned, self._keep))
        self._task.add_done_callback(self._on_done)

    def has_after(self, number: int) -> bool:
        """Is all that comes after this event kept?"""
        return self._first - 1 <= number < self._first + len(self._events)

    async def follow(self, number: int, receive: Receive, send: Send) -> None:
        """Send a client the events from this number on. Raises ApiError if the reply never begins."""
        follower = self._follower = object()  # who followed before is sent no more
        if self._timer is not None:
            self._timer.cancel()
        self._tell()
        watcher = asyncio.create_task(self._watch(receive, follower))
        try:
            while self._head is None and self._follower is follower and not self._task.done():
                await self._news.wait()
            if self._head is None:
                if self._task.done():
                    self._task.result()
                return
            await send({**self._head, "headers": list(self._head["headers"])})  # others may add to them
            async with streaming.kept_alive(send):
                while self._follower is follower:
                    if events := self._events[number - self._first :]:
                        number += len(events)
                        await streaming.send_events(send, b"".join(events))
                        self._num_sent = max(self._num_sent, number - 1)
                        self._drop_oldest()
                    elif self._is_complete:
                        break
                    else:
                        await self._news.wait()
            await streaming.send_events(send, b"", is_last=True)
        finally:
            watcher.cancel()
            self._leave(follower)

    async def _watch(self, receive: Receive, follower: object) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave(follower)

    def _leave(self, follower: object) -> None:
        if self._follower is follower:
            self._follower = None
            self._timer = asyncio.get_running_loop().call_later(self._grace_s, self._abandon)
            self._tell()

    def _abandon(self) -> None:
        self._abandoned.set()
        self._by_id.pop(self._id, None)

    def _tell(self) -> None:
        """Wake up all who wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    # What the reply is sent to.

    async def _until_abandoned(self) -> Message:
        await self._abandoned.wait()
        return {"type": "http.disconnect"}

    async def _keep(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            self._id = next(value for name, value in message["headers"] if name == b"x-request-id").decode()
            self._by_id[self._id] = self
        else:
            for event in message["body"].split(b"\n\n"):
                if event and not event.startswith(b":"):  # each follower gets comments of its own
                    number = self._first + len(self._events)
                    self._events.append(b"id: %s-%d\n%s\n\n" % (self._id.encode(), number, event))
                    self._num_bytes += len(self._events[-1])
            self._is_complete = not message.get("more_body")
            self._drop_oldest()
        self._tell()

    def _drop_oldest(self) -> None:
        num_dropped = 0
        while self._num_bytes > KEPT_BYTES and self._first + num_dropped <= self._num_sent:
            self._num_bytes -= len(self._events[num_dropped])
            num_dropped += 1
        del self._events[:num_dropped]
        self._first += num_dropped

    def _on_done(self, task: "asyncio.Future[None]") -> None:
        self._is_complete = True
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, ApiError):
            log.error("a reply failed halfway", exc_info=error)
        self._tell()
