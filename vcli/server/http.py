"""uvicorn as this server runs it: its own signals left out, TLS, and limits for clients that nobody knows yet.

What always holds: until a request's head is whole, a client costs no more than `MAX_HEAD_BYTES` of memory (and one
read of the socket), for no longer than `HEAD_TIMEOUT_S`; and a client that does not read its answer holds its place for
no longer than `WRITE_TIMEOUT_S`.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vcli.server.tls import Certificate

MAX_HEAD_BYTES = 64 * 2**10  # of one request: its path and its headers
HEAD_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 60.0  # for what waits to be sent, 64 KiB and more of it, to become less
LAST_WORDS_S = 2.0  # for replies that are already written to reach their clients


def http_server(app: Starlette, certificate: Certificate | None) -> uvicorn.Server:
    """A server of one listener, to be run by `serve(sockets=[...])`."""
    settings = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,  # through the root logger, which writes to stderr
        log_level="warning",
        access_log=False,  # request_log.py has its own
        server_header=False,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
    )
    settings.load()
    settings.ssl = certificate.context if certificate else None
    return _Server(settings)


def url_of(listener: socket.socket, *, is_tls: bool) -> str:
    address, port, *_ = listener.getsockname()
    return f"{'https' if is_tls else 'http'}://{f'[{address}]' if ':' in address else address}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `Lifetime` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """One connection. Its client has so much room and so long for the head of each request, and so long to read."""

    _num_head_bytes = 0
    _is_in_head = True
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._num_head_bytes = True, 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n"
    b'{"error":{"message":"the path and headers of the request are larger than 64 KiB: send less",'
    b'"type":"invalid_request_error","param":null,"code":null}}'
)
