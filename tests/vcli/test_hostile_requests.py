"""Requests that hurt a real engine, or try to: they end in an error of their own, and nobody else notices."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from bench import soak
from tests.conftest import SPOILT_TOKEN
from tests.vcli.conftest import Server

FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "8MiB")


@pytest.fixture(scope="module")
def server(start_server, spoilt_checkpoint):
    server = start_server(*FLAGS, model=spoilt_checkpoint).wait_ready()
    yield server
    assert "Traceback" not in server.log


def complete(server: Server, prompt: list[int], **options: object) -> httpx.Response:
    without = {"ignore_eos": True, "logit_bias": {SPOILT_TOKEN: -100}, "return_token_ids": True}
    return server.post("/v1/completions", json={"prompt": prompt, "max_tokens": 30, **without, **options})


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 2, "top_p": 0.9, "logprobs": 2}])
def test_nan_logits_end_the_request_that_has_them_with_a_clear_error(server, params):
    sound, spoilt = [5, 6, 7, 8] * 10, [5, 6, 7, 8] * 9 + [SPOILT_TOKEN]
    alone = complete(server, sound, **params).json()["choices"][0]["token_ids"]
    num_failed = server.metric('vcli:request_success_total{finished_reason="error"')
    with ThreadPoolExecutor() as pool:
        neighbours = [pool.submit(complete, server, sound, **params) for _ in range(4)]
        failed = [pool.submit(complete, server, spoilt, n=2, **params) for _ in range(4)]
    for reply in failed:
        assert reply.result().status_code == 500
        error = reply.result().json()["error"]
        assert error["code"] == "invalid_logits"
        assert "token 1 of the answer are NaN or infinite" in error["message"]
    assert [reply.result().json()["choices"][0]["token_ids"] for reply in neighbours] == [alone] * 4
    assert server.metric('vcli:request_success_total{finished_reason="error"') == num_failed + 8
    server.wait_until(lambda: server.metric("vcli:kv_cache_usage_perc") == 0)
    assert complete(server, spoilt[:-1], **params).status_code == 200, "what they left in the cache is not used"


def test_a_stream_whose_logits_turn_into_nan_ends_with_an_error_event(server):
    leads_to_nan = {"ignore_eos": True, "logit_bias": {SPOILT_TOKEN: 100}, "return_token_ids": True}
    stream = server.client.completions.create(
        model="", prompt=[5, 6, 7, 8], max_tokens=9, stream=True, extra_body=leads_to_nan
    )
    first = next(stream)
    assert (first.choices[0].model_extra or {})["token_ids"] == [SPOILT_TOKEN]
    with pytest.raises(openai.APIError, match="token 2 of the answer are NaN or infinite"):
        next(stream)


def test_a_prompt_with_nan_in_its_hidden_states_has_no_embedding_and_its_neighbours_do(server):
    reply = server.post("/v1/embeddings", json={"input": [[5, 6, SPOILT_TOKEN, 7]], "pooling": "mean"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "invalid_embedding")
    assert server.post("/v1/embeddings", json={"input": [[5, 6, 7]], "pooling": "mean"}).status_code == 200


def test_good_requests_do_not_notice_the_bad_ones(server):
    """The short form of `python -m bench.soak`: leaving clients, strange values, changed bytes, no HTTP, NaN."""
    plan = soak.Plan(num_requests=1000, spoilt_token=SPOILT_TOKEN)
    result = asyncio.run(soak.visit(server.url, psutil.Process(server.process.pid), plan))
    assert result.failures == []
    assert not any(result.gauges.values()), "something is left running"
    assert soak.log_errors(server.log) == []
    assert result.statuses["NaN logits"].keys() == {"200", "500"}, "told by an event, or by the status"
    assert max(result.growth.values()) <= soak.MAX_GROWTH
