"""The load client against a fake server whose delays are known. Ratios and orders only: the machine may be busy."""

import asyncio

import pytest

from bench.client import LoadClient, spread
from bench.metrics import RequestRecord
from bench.workloads import BenchRequest


def send(server, *requests: BenchRequest, **extensions: object) -> list[RequestRecord]:
    records: list[RequestRecord] = []

    async def run() -> None:
        async with LoadClient(server.url, "fake", extensions=extensions, timeout_s=10) as client:
            records.extend([await client.send(request) for request in requests])

    asyncio.run(run())
    return records


def completion(num_tokens: int) -> BenchRequest:
    return BenchRequest(output_len=num_tokens, prompt=[1, 2, 3])


def test_it_measures_the_first_token_and_the_gaps_apart(fake_server):
    fake_server.first_token_s, fake_server.gap_s = 0.4, 0.05

    (record,) = send(fake_server, completion(5), return_token_ids=True)

    assert not record.error
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 5)
    assert record.ttft >= 0.4
    assert all(gap >= 0.03 for gap in record.gaps)
    assert record.ttft > 3 * max(record.gaps)
    assert record.ended >= record.sent + record.e2el


def test_chunks_of_several_tokens_are_counted_by_their_token_ids(fake_server):
    fake_server.tokens_per_chunk, fake_server.gap_s = 4, 0.05

    (record,) = send(fake_server, completion(10), return_token_ids=True)

    assert [num_tokens for _, num_tokens in record.chunks] == [4, 4, 2]
    assert len(record.gaps) == 9


def test_without_token_ids_the_servers_usage_is_laid_over_the_chunks(fake_server):
    fake_server.tokens_per_chunk, fake_server.gap_s = 4, 0.05

    (record,) = send(fake_server, completion(10))

    assert record.num_output_tokens == 10
    assert len(record.chunks) == 3


def test_the_role_of_a_chat_is_no_token(fake_server):
    fake_server.first_token_s = 0.3

    (record,) = send(fake_server, BenchRequest(output_len=3, messages=[{"role": "user", "content": "Hi"}]))

    assert not record.error
    assert record.ttft >= 0.3
    assert record.num_output_tokens == 3


def test_a_stream_that_ends_with_its_usage_is_whole(fake_server):
    fake_server.sends_done = False

    (record,) = send(fake_server, completion(3))

    assert (record.error, record.num_output_tokens) == ("", 3)


def test_a_field_that_a_server_refuses_is_left_out_and_one_that_it_needs_is_sent(fake_server):
    (record,) = send(fake_server, completion(2), ignore_eos=None, generation_config="{}")

    assert record.num_output_tokens == 2
    assert "ignore_eos" not in fake_server.bodies[0]
    assert fake_server.bodies[0]["generation_config"] == "{}"


@pytest.mark.parametrize("missing", ["sends_usage", "counts_tokens"])
def test_a_server_without_usage_is_a_failure_and_not_a_guess(fake_server, missing: str):
    setattr(fake_server, missing, False)

    (record,) = send(fake_server, completion(3))

    assert "usage" in record.error


@pytest.mark.parametrize(
    ("fail", "message"),
    [("http", "HTTP 500: out of coffee"), ("break", "broke off"), ("error", "the engine died"), ("bytes", "utf-8")],
)
def test_failures_are_recorded_with_the_servers_words(fake_server, fail: str, message: str):
    fake_server.fail, fake_server.fail_every = fail, 2

    records = send(fake_server, *[completion(3)] * 4)

    assert [bool(record.error) for record in records] == [False, True, False, True]
    assert all(message in record.error for record in records if record.error)


def test_a_server_that_is_not_there_is_a_failure(fake_server):
    fake_server.url = "http://127.0.0.1:1"

    (record,) = send(fake_server, completion(3))

    assert "127.0.0.1" in record.error


@pytest.mark.parametrize(("num_chunks", "num_tokens"), [(3, 3), (3, 10), (5, 2), (1, 7), (7, 1)])
def test_spreading_keeps_the_total_and_the_first_arrival(num_chunks: int, num_tokens: int):
    chunks = [(float(i), 1) for i in range(num_chunks)]

    shares = spread(chunks, num_tokens)

    assert sum(count for _, count in shares) == num_tokens
    assert shares[0][0] == 0.0
    assert all(count >= 1 for _, count in shares)
