"""The engine is killed again and again, and no stream loses a token or gets one twice."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.vcli.conftest import Server
from vcli.server import streaming

NUM_STREAMS, NUM_TOKENS, NUM_KILLS = 32, 300, 5
FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-restarts", "100")


def stream_tokens(server: Server, index: int) -> list[int]:
    """A stream's tokens: every second one is drawn at random, with a seed."""
    prompt = [1 + (7 * index + i) % 200 for i in range(5 + index)]
    events = server.client.completions.create(
        model="",
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=index % 2,
        seed=index,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return [token for event in events for token in (event.choices[0].model_extra or {}).get("token_ids") or []]


def all_tokens(server: Server) -> list[list[int]]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda index: stream_tokens(server, index), range(NUM_STREAMS)))


def test_streams_do_not_notice_that_the_engine_is_killed(start_server, tiny_checkpoint):
    server = start_server(*FLAGS, model=tiny_checkpoint("llama", max_position_embeddings=512)).wait_ready()
    undisturbed = all_tokens(server)
    assert all(len(tokens) == NUM_TOKENS for tokens in undisturbed)

    draw = random.Random(0)
    with ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(all_tokens, server)
        for number in range(1, NUM_KILLS + 1):
            time.sleep(draw.uniform(0.05, 0.5))
            [engine] = psutil.Process(server.process.pid).children()
            engine.kill()
            server.wait_until(lambda number=number: server.metric("vcli:engine_restarts_total") == number)
            if number % 2 == 0:  # or it dies while it loads
                server.wait_ready()
        assert disturbed.result(timeout=120) == undisturbed
    assert server.metric("vcli:num_requests_running") == 0


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
    sent: list[bytes] = []

    async def send(message: dict) -> None:
        sent.append(message["body"])

    async def story() -> None:
        async with streaming.kept_alive(send):
            while len(sent) < 2:
                await asyncio.sleep(0.01)
        num_sent = len(sent)
        await asyncio.sleep(0.05)
        assert len(sent) == num_sent

    asyncio.run(asyncio.wait_for(story(), 30))
    assert all(event.startswith(b":") and event.endswith(b"\n\n") for event in sent), "comments, as SSE has them"
