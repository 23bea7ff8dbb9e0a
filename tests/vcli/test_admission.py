"""Who is let in, who is turned away, and what they are told. The engine repeats the prompt, two sequences at a time."""

import contextlib
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.vcli.conftest import Server

COMPLETIONS = "/v1/completions"
STEP_S = 0.01


@pytest.fixture(scope="module")
def server(start_server) -> Server:
    flags = ("--max-num-seqs", "2", "--max-queue", "12", "--max-queue-tokens", "150")
    return start_server(*flags, FAKE_STEP_S=str(STEP_S)).wait_ready()


def ask(server: Server, num_tokens: int, deadline_ms: object = None, **body: object) -> httpx.Response:
    headers = {} if deadline_ms is None else {"x-request-deadline-ms": str(deadline_ms)}
    body = {"prompt": [5, 6], "max_tokens": num_tokens, "ignore_eos": True} | body
    return server.post(COMPLETIONS, json=body, headers=headers)


@contextlib.contextmanager
def asking(server: Server, count: int, num_tokens: int, **body: object) -> Iterator[list[httpx.Response]]:
    """While the block runs, so many streams are open; what has not come by its end does not come."""
    num_open = server.metric("vcli:num_requests")
    body = {"prompt": [5, 6], "max_tokens": num_tokens, "ignore_eos": True, "stream": True} | body
    with httpx.Client(timeout=60) as client:
        request = client.build_request("POST", server.url + COMPLETIONS, json=body)
        streams = [client.send(request, stream=True) for _ in range(count)]
        server.wait_until(lambda: server.metric("vcli:num_requests") == num_open + count)  # running and waiting
        yield streams
        for stream in streams:
            stream.close()
    server.wait_until(lambda: server.metric("vcli:num_requests") == num_open)


def rejections(server: Server, reason: str) -> float:
    lines = [line for line in server.get("/metrics").text.splitlines() if f'reason="{reason}"' in line]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_prompts_that_wait_may_hold_only_so_many_tokens(server):
    with asking(server, 2, 400), asking(server, 1, 1, prompt=[5] * 100):
        refused = ask(server, 1, prompt=[5] * 51)
        assert code(refused) == (429, "queue_tokens_full")
        assert "100 prompt tokens wait, at most 150 may" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        with asking(server, 1, 1, prompt=[5] * 50):
            assert code(ask(server, 1, prompt=[5])) == (429, "queue_tokens_full")
    assert ask(server, 1, prompt=[5] * 400).status_code == 200, "where nothing waits any prompt may"


def learn(server: Server, num_tokens: int) -> None:
    """Have sequences end while others wait, so that the server knows what that takes."""
    with asking(server, 8, num_tokens) as streams:
        for stream in streams:
            stream.read()


def test_retry_after_is_when_half_of_the_queue_will_have_started(server):
    num_tokens = 60
    learn(server, num_tokens)
    with asking(server, 14, num_tokens):
        refused = ask(server, 1)
    assert code(refused) == (429, "queue_full")
    whole_queue_s = 12 / 2 * num_tokens * STEP_S
    assert int(refused.headers["retry-after"]) >= whole_queue_s / 2


def test_what_cannot_be_there_in_time_is_refused_at_once(server):
    learn(server, 30)
    before = rejections(server, "deadline_unreachable")
    with asking(server, 4, 400):
        start = time.monotonic()
        refused = ask(server, 30, deadline_ms=500)
        took_s = time.monotonic() - start
    with asking(server, 4, 30):
        served = ask(server, 30, deadline_ms=60_000)
    assert code(refused) == (429, "deadline_unreachable")
    assert "the request gives 0.5 s" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert took_s < 0.4, "it has not waited for its time to be over"
    assert served.status_code == 200
    assert rejections(server, "deadline_unreachable") == before + 1
    assert ask(server, 30, deadline_ms=3_000).status_code == 200, "without a queue there is time enough"


def test_an_answer_that_is_not_done_in_time_ends_then(server):
    late = ask(server, 490, deadline_ms=300)
    assert code(late) == (503, "deadline_exceeded")
    assert int(late.headers["retry-after"]) >= 1
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)


def test_a_stream_that_could_not_begin_in_time_gets_a_plain_error(start_server):
    """Nothing is known yet of how long others take, so it may wait; another is late in the middle of its answer."""
    server = start_server("--max-num-seqs", "1", FAKE_STEP_S=str(STEP_S)).wait_ready()
    with asking(server, 2, 400):
        late = ask(server, 10, deadline_ms=300, stream=True)
        assert code(late) == (503, "deadline_exceeded")
    begun = ask(server, 490, deadline_ms=400, stream=True)
    assert begun.status_code == 200
    assert '"code":"deadline_exceeded"' in begun.text.strip().split("\n\n")[-1]


@pytest.mark.parametrize("value", ["soon", "-5", "0", "1.5", "9" * 5000])
def test_a_strange_deadline_is_named(server, value):
    refused = ask(server, 1, deadline_ms=value)
    assert refused.status_code == 400
    assert "X-Request-Deadline-Ms" in refused.json()["error"]["message"]


def test_priority_is_refused_where_it_would_be_ignored(start_server):
    server = start_server("--scheduling-policy", "fcfs").wait_ready()
    refused = ask(server, 1, priority=3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert ask(server, 1, priority=0).status_code == 200
