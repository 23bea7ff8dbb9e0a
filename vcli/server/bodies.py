"""What clients send, read within limits of size and time, and decoded.

Decoding holds everybody up, since JSON becomes Python objects on the loop's thread: large bodies are decoded one at a
time, and whatever else is ready has its turn between two.
"""

import asyncio
import gc
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from vcli.server import protocol
from vcli.server.headers import header
from vcli.server.protocol import ApiError

MAX_BODY_BYTES = 4 * 2**20  # a million tokens of text, half a million token ids
BODY_TIMEOUT_S = 60.0
LARGE_BODY_BYTES = 256 * 2**10  # decoded within a millisecond or two

Request = TypeVar("Request")


class ClientGoneError(Exception):
    """The client left before it had said what it wants."""


class Bodies:
    """Owns the turn of large bodies."""

    def __init__(self) -> None:
        self._large = asyncio.Lock()

    async def read(self, decoder: msgspec.json.Decoder[Request], scope: Scope, receive: Receive) -> Request:
        """A request's body as its struct. Raises ApiError, and ClientGoneError if it never comes."""
        body = await read_body(scope, receive)
        if len(body) < LARGE_BODY_BYTES:
            return protocol.decode(decoder, body)
        async with self._large:
            await asyncio.sleep(0)
            gc.disable()  # millions of new objects are no reason to look at all of them again and again
            try:
                return protocol.decode(decoder, body)
            finally:
                gc.enable()


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises ApiError for one that is too large or slow, ClientGoneError if it never comes."""
    length = header(scope, "Content-Length") or b"0"
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read_parts(receive)
    except TimeoutError:
        raise ApiError(408, f"the request body did not come within {BODY_TIMEOUT_S:g} s: send it faster") from None


async def _read_parts(receive: Receive) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large() -> ApiError:
    return ApiError(413, f"the request body is larger than {MAX_BODY_BYTES >> 20} MiB: send less at once")
