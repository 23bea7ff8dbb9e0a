"""Between the engine's streams and the socket: server-sent events, and noticing that the client has left.

Events are sent as plain ASGI messages, which costs half of what a framework's streaming response does. What always
holds: when a client goes away its sequences are aborted at once, so that their KV blocks are free within a step.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.types import Receive, Send

from engine.outputs import OutputDelta
from engine.request_stream import RequestStream

KEEP_ALIVE_S = 15.0


@contextlib.asynccontextmanager
async def kept_alive(send: Send, comment: bytes = b": still here\n\n") -> AsyncIterator[None]:
    """While the block runs, send a comment now and then: a silent stream is not to be taken for a dead one."""

    async def keep_alive() -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_S)
            await send_events(send, comment)

    task = asyncio.create_task(keep_alive())
    try:
        yield
    finally:
        task.cancel()


@contextlib.asynccontextmanager
async def abort_at_disconnect(receive: Receive, streams: Sequence[RequestStream]) -> AsyncIterator[None]:
    """While the block runs, abort the streams as soon as the client is gone; at its end, whatever still runs."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        abort_all()

    def abort_all() -> None:
        for stream in streams:
            stream.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        abort_all()


async def interleave(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, list[OutputDelta]]]:
    """What several streams give, as it comes, with the index of the stream. Raises what a stream raises."""
    if len(streams) == 1:
        async for deltas in streams[0]:
            yield 0, merge(deltas)
        return

    news: asyncio.Queue[tuple[int, list[OutputDelta] | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for deltas in stream:
                news.put_nowait((index, merge(deltas)))
            news.put_nowait((index, None))
        except Exception as error:
            news.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_running = len(pumps)
        while num_running:
            index, item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()


def merge(deltas: list[OutputDelta]) -> list[OutputDelta]:
    """Deltas that waited together become one for each sequence: slow readers get fewer, larger events."""
    if len(deltas) == 1:
        return deltas
    merged: dict[int, OutputDelta] = {}
    for delta in deltas:
        earlier = merged.setdefault(delta.index, delta)
        if earlier is not delta:
            earlier.text += delta.text
            earlier.token_ids = earlier.token_ids + delta.token_ids
            earlier.logprobs = [*(earlier.logprobs or []), *(delta.logprobs or [])]
            earlier.finish_reason, earlier.stop_reason = delta.finish_reason, delta.stop_reason
    return list(merged.values())


async def start_events(send: Send, request_id: str) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # a proxy must not hold events back
        *_id_headers(request_id),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def send_events(send: Send, events: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": events, "more_body": not is_last})


async def send_json(send: Send, body: bytes, request_id: str) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *_id_headers(request_id),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _id_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    """By the name that OpenAI's clients read, and Anthropic's."""
    return [(b"x-request-id", request_id.encode()), (b"request-id", request_id.encode())]
