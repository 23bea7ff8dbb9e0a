"""The engine is killed again and again, and no stream loses a token or gets one twice."""

import asyncio

import pytest

from bench import chaos
from vcli.server import streaming


def test_streams_do_not_notice_that_the_engine_is_killed(default_model):
    """`python -m bench.chaos` is the longer form."""
    plan = chaos.Plan(num_kills=20, input_len=8, output_len=16, longest_life_s=0.6, share_loading=0.8)
    small = ["--kv-cache-memory", "128MiB", "--max-num-batched-tokens", "256"]
    result = chaos.run([str(default_model), "--device", "cpu", "--dtype", "float32", *small], plan)

    assert result.num_kills == 20
    assert result.num_killed_under >= plan.num_streams
    assert result.errors == []
    assert (result.num_missing, result.num_extra, result.num_other) == (0, 0, 0), "the same tokens as undisturbed"
    assert result.num_tokens == plan.output_len * (plan.num_streams + result.num_streams)
    assert result.num_tokens_counted == result.num_tokens, "the counter goes on in the next engine"


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
