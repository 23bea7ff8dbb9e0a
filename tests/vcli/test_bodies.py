import asyncio
from typing import Any

import pytest

from vcli.server.bodies import LARGE_BODY_BYTES, Bodies


class Decoder:
    """Notes when it is at work."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def decode(self, body: bytes) -> int:
        self.log.append("decoding")
        return len(body)


async def read(bodies: Bodies, decoder: Any, size: int) -> int:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * size}

    return await bodies.read(decoder, {"type": "http", "headers": []}, receive)


@pytest.mark.parametrize(("size", "in_turn"), [(LARGE_BODY_BYTES, True), (LARGE_BODY_BYTES - 1, False)])
def test_between_two_large_bodies_others_have_their_turn(size: int, in_turn: bool):
    log: list[str] = []

    async def tick() -> None:
        while True:
            log.append("others")
            await asyncio.sleep(0)

    async def story() -> None:
        bodies, ticking = Bodies(), asyncio.create_task(tick())
        sizes = await asyncio.gather(*(read(bodies, Decoder(log), size) for _ in range(8)))
        ticking.cancel()
        assert sizes == [size] * 8

    asyncio.run(story())
    assert log.count("decoding") == 8
    assert ("decoding decoding" not in " ".join(log)) == in_turn
