"""The engine is killed again and again, and no stream loses a token or gets one twice."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench import chaos
from tests.vcli.serve_with_poison import POISON
from vcli.server import streaming

SERVE_WITH_POISON = Path(__file__).with_name("serve_with_poison.py")


def test_streams_do_not_notice_that_the_engine_is_killed(default_model):
    """`python -m bench.chaos` is the longer form."""
    plan = chaos.Plan(num_kills=20, input_len=8, output_len=16, longest_life_s=2.0, share_loading=0.9)
    small = ["--kv-cache-memory", "128MiB", "--max-num-batched-tokens", "256"]
    result = chaos.run([str(default_model), "--device", "cpu", "--dtype", "float32", *small], plan)

    assert result.num_kills == 20
    assert result.num_killed_under >= plan.num_streams
    assert result.errors == []
    assert (result.num_missing, result.num_extra, result.num_other) == (0, 0, 0), "tokens and texts as undisturbed"
    assert result.num_tokens == plan.output_len * (plan.num_streams + result.num_streams)
    assert result.num_tokens_counted == result.num_tokens, "the counter goes on in the next engine"


def test_a_request_that_ends_engines_fails_alone_and_32_streams_go_on(start_server, tiny_checkpoint):
    flags = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "16MiB")
    server = start_server(*flags, model=tiny_checkpoint("llama"), script=SERVE_WITH_POISON).wait_ready()

    def ask(prompt: list[int] | list[list[int]]) -> httpx.Response:
        asked = {"prompt": prompt, "max_tokens": 400, "seed": 3, "ignore_eos": True, "return_token_ids": True}
        return server.post("/v1/completions", json=asked)

    def ask_all() -> list[list[int]]:
        choices = ask([[5 + index] * 20 for index in range(32)]).json()["choices"]
        return [choice["token_ids"] for choice in choices]

    with ThreadPoolExecutor(1) as pool:
        undisturbed = ask_all()
        assert [len(token_ids) for token_ids in undisturbed] == [400] * 32
        disturbed = pool.submit(ask_all)
        server.wait_until(lambda: server.metric("vcli:num_requests_running") == 32)
        poisoned = ask([POISON, 7, 7])
        assert disturbed.result(120) == undisturbed
    assert (poisoned.status_code, poisoned.json()["error"]["code"]) == (500, "quarantined")
    assert "ended by SIGABRT" in poisoned.json()["error"]["message"]
    assert ask([POISON, 7, 7]).status_code == 422
    assert ask([7, POISON, 7]).status_code == 200
    assert server.metric("vcli:quarantined_requests_total") == 1
    assert server.metric("vcli:engine_restarts_total") == 3, "twice with the others, once alone"
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
