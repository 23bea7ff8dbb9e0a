"""Connections whose other end does not do its part, against uvicorn as the server runs it."""

import asyncio
import contextlib
import socket

import pytest

from vcli.server import http

PIECE, NUM_PIECES = b"x" * 100_000, 200  # more than the system holds for a connection


def test_a_client_that_does_not_read_its_answer_is_left(monkeypatch: pytest.MonkeyPatch):
    """Two clients ask: one reads slowly, with pauses within the limit, the other nothing at all."""
    monkeypatch.setattr(http, "WRITE_TIMEOUT_S", 2.0)
    ended: set[str] = set()

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(NUM_PIECES):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.add(scope["path"])

    async def ask(port: int, path: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(b"GET %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" % path)
        return reader, writer

    async def story() -> tuple[int, int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            served = http.http_server(app, None)
            serving = asyncio.create_task(served.serve(sockets=[listener]))
            port = listener.getsockname()[1]
            slow, its_writer = await ask(port, b"/slow")
            deaf, deaf_writer = await ask(port, b"/deaf")
            num_slow = num_deaf = 0
            for _ in range(6):
                await asyncio.sleep(0.3)
                num_slow += len(await slow.readexactly(2_500_000))
            num_slow += len(await slow.read())
            while "/deaf" not in ended:
                await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionResetError):
                while part := await deaf.read(1_000_000):
                    num_deaf += len(part)
            for writer in (its_writer, deaf_writer):
                writer.close()
            served.should_exit = True
            await serving
            return num_slow, num_deaf

    num_slow, num_deaf = asyncio.run(asyncio.wait_for(story(), 30))
    assert num_slow > len(PIECE) * NUM_PIECES > num_deaf
    assert ended == {"/slow", "/deaf"}
