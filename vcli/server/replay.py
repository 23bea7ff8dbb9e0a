"""Event streams that outlive their connections: a client that lost its own comes back and reads on.

A client that asks for it (`X-Reconnect-Grace-Ms`) gets events with ids, and sends the last one that it has seen as
`Last-Event-ID` with any request to the same path. Its reply is made by a task of its own, which speaks ASGI as if to
the client: what it sends is numbered and kept here for whoever follows, and that the client is gone it hears when
nobody has followed for the grace time. What always holds: every event that the last follower has not been sent is kept,
and KEPT_BYTES of those before, since what was sent may not have arrived.

A reply that is made in the background waits for nobody: it goes on without followers, has as many as come, and the last
KEPT_IN_BACKGROUND_BYTES of its events stay until somebody forgets it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Scope, Send

from vcli.server import streaming
from vcli.server.headers import header, milliseconds
from vcli.server.protocol import ApiError

MAX_GRACE_MS = 60_000
KEPT_BYTES = 1 << 20  # of one stream, beyond what its client has not been sent
KEPT_IN_BACKGROUND_BYTES = 8 << 20  # of one stream: some 30,000 tokens
MOST_BYTES = 256 << 20  # of all streams; then those that are over go early
MAX_NUMBER_DIGITS = 9

log = logging.getLogger("vcli")


def grace_s(scope: Scope) -> float:
    """How long the client may be away, as it says; 0 if it says nothing. Raises ApiError for no such number of ms."""
    return (milliseconds(scope, "X-Reconnect-Grace-Ms", least=0, most=MAX_GRACE_MS) or 0) / 1000


def last_event_id(scope: Scope) -> str | None:
    """The last event that a client has seen that reads on."""
    event_id = header(scope, "Last-Event-ID")
    return None if event_id is None else event_id.decode("latin-1")


class Replays:
    """The streams of a server that can be read on, by the ids of their replies."""

    def __init__(self) -> None:
        self._by_id: dict[str, Replay] = {}
        self._num_bytes = 0

    def start(self, make: Callable[[Receive, Send], Awaitable[None]], grace_s: float, owner: str) -> "Replay":
        """A stream that `make` sends. owner: the tenant, who alone may follow it."""
        return Replay(self, make, grace_s, owner)

    def start_in_background(self, make: Callable[[Receive, Send], Awaitable[None]], owner: str) -> "Replay":
        """A stream that is made whether somebody follows it or not."""
        return Replay(self, make, None, owner)

    def find(self, event_id: str, owner: str) -> "tuple[Replay, int]":
        """A stream, and the number of the event after this one. Raises ApiError if it is not there (any more)."""
        name, _, number = event_id.rpartition("-")
        replay = self._by_id.get(name)
        is_number = number.isascii() and number.isdigit() and len(number) <= MAX_NUMBER_DIGITS
        if replay is None or replay.owner != owner or not is_number or not replay.has_after(int(number)):
            message = f"no stream goes on after event {event_id[:100]!r}: it was not sent, or its grace time is over"
            raise ApiError(404, message, code="stream_gone")
        return replay, int(number) + 1

    def of(self, reply_id: str) -> "Replay | None":
        return self._by_id.get(reply_id)

    def add(self, replay: "Replay") -> None:
        self._by_id[replay.id] = replay

    def remove(self, replay: "Replay") -> None:
        self._by_id.pop(replay.id, None)

    def count(self, num_bytes: int) -> None:
        """So many more bytes are kept, or fewer."""
        self._num_bytes += num_bytes
        while self._num_bytes > MOST_BYTES and (oldest := next(filter(Replay.is_over, self._by_id.values()), None)):
            oldest.forget()


class Replay:
    """One reply's events, and whoever follows them: one connection at a time, the latest, or any in the background."""

    def __init__(
        self, replays: Replays, make: Callable[[Receive, Send], Awaitable[None]], grace_s: float | None, owner: str
    ) -> None:
        """grace_s: None in the background."""
        self.owner = owner
        self.id = ""  # of the reply, once it has begun
        self._replays = replays
        self._grace_s = grace_s
        self._head: Message | None = None
        self._events: list[bytes] = []
        self._first = 1  # number of the first one that is kept
        self._num_bytes = 0  # of the kept ones
        self._num_sent = 0  # number of the last one that a follower has been sent
        self._num_sent_bytes = 0  # of those that are kept and sent
        self._is_complete = False
        self._followers: set[object] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._ending = asyncio.Event()  # the reply is told that its client is gone
        self._is_forgotten = False
        self._task = asyncio.ensure_future(make(self._until_ending, self._keep))
        self._task.add_done_callback(self._on_done)

    def has_after(self, number: int) -> bool:
        """Was this event made, and is all that comes after it kept?"""
        return number < self._first + len(self._events) and self.keeps_after(number)

    def keeps_after(self, number: int) -> bool:
        """Is nothing dropped that comes after this event? It may not have been made yet."""
        return self._first - 1 <= number

    def is_over(self) -> bool:
        """Nothing more comes, and nobody follows."""
        return self._is_complete and not self._followers

    async def begin(self) -> None:
        """Return when the first event is there. Raises ApiError if the reply never begins."""
        while not self._events and not self._task.done():
            await self._news.wait()
        if self._head is None:
            self._task.result()

    async def follow(self, number: int, receive: Receive, send: Send) -> None:
        """Send a client the events from this number on. Raises ApiError if the reply never begins."""
        follower = object()
        if self._grace_s is not None:
            self._followers.clear()  # who followed before is sent no more
        self._followers.add(follower)
        if self._timer is not None:
            self._timer.cancel()
        self._tell()
        watcher = asyncio.create_task(self._watch(receive, follower))
        try:
            while self._head is None and follower in self._followers and not self._task.done():
                await self._news.wait()
            if self._head is None:
                if self._task.done():
                    self._task.result()
                return
            await send({**self._head, "headers": list(self._head["headers"])})  # others may add to them
            # No blank line behind it: where events have ids, OpenAI's and Anthropic's clients take that for an event.
            async with streaming.kept_alive(send, b": still here\n"):
                while follower in self._followers and number >= self._first:  # else it is too slow for what is kept
                    if events := self._events[number - self._first :]:
                        number += len(events)
                        await streaming.send_events(send, b"".join(events))
                        if self._grace_s is not None and follower in self._followers:  # else others may have less
                            self._note_sent(number - 1)
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
        if follower in self._followers:
            self._followers.remove(follower)
            if self._grace_s is not None:
                self._timer = asyncio.get_running_loop().call_later(self._grace_s, self.forget)
            self._tell()

    async def end(self) -> None:
        """Have the request end as if its client had gone, and return when it has. What is kept of it stays."""
        self._ending.set()
        await asyncio.wait([self._task])

    def forget(self) -> None:
        """Nobody comes back: the request ends, and what is kept of it goes."""
        self._ending.set()
        if not self._is_forgotten:
            self._is_forgotten = True
            self._replays.remove(self)
            self._drop(self._num_bytes)

    def _tell(self) -> None:
        """Wake up all who wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    # What the reply is sent to.

    async def _until_ending(self) -> Message:
        await self._ending.wait()
        return {"type": "http.disconnect"}

    async def _keep(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            self.id = next(value for name, value in message["headers"] if name == b"x-request-id").decode()
            self._replays.add(self)
        elif not self._is_forgotten:
            num_bytes_before = self._num_bytes
            for event in message["body"].split(b"\n\n"):
                if event and not event.startswith(b":"):  # each follower gets comments of its own
                    number = self._first + len(self._events)
                    self._events.append(b"id: %s-%d\n%s\n\n" % (self.id.encode(), number, event))
                    self._num_bytes += len(self._events[-1])
            self._is_complete = not message.get("more_body")
            self._replays.count(self._num_bytes - num_bytes_before)
            if self._grace_s is None:
                self._drop(self._num_bytes - KEPT_IN_BACKGROUND_BYTES)
        self._tell()

    def _note_sent(self, number: int) -> None:
        """A follower has been sent all up to this event: what is too long ago is dropped."""
        for event in self._events[self._num_sent - self._first + 1 : max(number - self._first + 1, 0)]:
            self._num_sent_bytes += len(event)
        self._num_sent = max(self._num_sent, number)
        self._num_sent_bytes -= self._drop(self._num_sent_bytes - KEPT_BYTES)

    def _drop(self, at_least: int) -> int:
        """Drop so many bytes of the oldest events, or some more; return how many."""
        num_dropped = num_bytes = 0
        while num_bytes < at_least:
            num_bytes += len(self._events[num_dropped])
            num_dropped += 1
        del self._events[:num_dropped]
        self._first += num_dropped
        self._num_bytes -= num_bytes
        self._replays.count(-num_bytes)
        return num_bytes

    def _on_done(self, task: "asyncio.Future[None]") -> None:
        self._is_complete = True
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, ApiError):
            log.error("a reply failed halfway", exc_info=error)
        self._tell()
