"""The server from its first moment to its exit code."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.vcli.conftest import Server, free_port

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a b c", "max_tokens": 100, "ignore_eos": True}


@contextmanager
def long_stream(server: Server) -> Iterator[Iterator[str]]:
    """The events of a stream after the first one, which has come."""
    with httpx.stream("POST", server.url + COMPLETIONS, json=LONG | {"stream": True}, timeout=30) as reply:
        events = filter(None, reply.iter_lines())
        next(events)
        yield events


@contextmanager
def asking(server: Server, count: int) -> Iterator[list[Future[httpx.Response]]]:
    """So many ask at once while the block runs; it ends when all are answered."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(server.post, COMPLETIONS, json=LONG) for _ in range(count)]


def payload(event: str) -> dict[str, Any]:
    return json.loads(event.removeprefix("data: "))


def check_all_came(server: Server, events: list[str]) -> None:
    """In what came of a `long_stream` nothing is lost, and nothing comes twice."""
    text = "".join(payload(event)["choices"][0]["text"] for event in events[:-1])
    whole = server.post(COMPLETIONS, json=LONG).json()["choices"][0]["text"]
    assert whole.endswith(text)
    assert len(text.split()) == len(whole.split()) - 1, "all but the first token, which came before"


def test_http_answers_while_the_model_loads(start_server):
    server = start_server(FAKE_LOAD_S="3").wait_http()
    reply = server.get("/ready")
    assert reply.status_code == 503
    assert reply.json()["status"] == "loading"
    assert 0 <= reply.json()["percent"] <= 100
    assert server.get("/health").status_code == 200
    assert server.get("/version").json()["version"]
    assert server.get("/v1/models").status_code == 200
    refused = server.post(COMPLETIONS, json={"prompt": "a"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    server.wait_ready()
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
    assert server.metric('vcli:admission_rejections_total{model_name="') == 1


def test_start_up_tells_the_address_and_what_fits(start_server):
    server = start_server("--served-model-name", "echo").wait_ready()
    server.wait_until(lambda: "ready in" in server.log)
    assert f"serves echo on {server.url}" in server.log
    assert "16,384 tokens: 32.0 requests of the full 512 tokens" in server.log


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_open_streams_finish_and_exits_with_0(start_server, signal_number):
    server = start_server(FAKE_STEP_S="0.02").wait_ready()
    with long_stream(server) as events:
        server.process.send_signal(signal_number)
        server.wait_until(lambda: server.get("/ready").status_code == 503)
        refused = server.post(COMPLETIONS, json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        rest = list(events)
    assert rest[-1] == "data: [DONE]"
    assert payload(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_drain_ends_at_its_timeout(start_server):
    server = start_server("--shutdown-timeout", "300ms", FAKE_STEP_S="0.1").wait_ready()
    with long_stream(server) as events:
        server.process.send_signal(signal.SIGTERM)
        rest = list(events)
    assert "error" in payload(rest[-1])
    assert server.process.wait(20) == 0


def test_second_signal_ends_at_once(start_server):
    server = start_server(FAKE_STEP_S="0.5").wait_ready()
    with asking(server, 1):
        server.wait_until(lambda: server.metric("vcli:num_requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: "may finish" in server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 128 + signal.SIGTERM


def test_signal_while_loading_ends_at_once(start_server):
    server = start_server(FAKE_LOAD_S="60").wait_http()
    assert server.end() == 0


@pytest.mark.parametrize(("how", "cause"), [("die", "exit code 7"), ("fail", "out of luck: buy more")])
def test_dead_engine_ends_open_requests_and_the_process_with_its_cause(start_server, how, cause):
    server = start_server("--max-restarts", "1", FAKE_STEP_S="0.05").wait_ready()
    with asking(server, 1) as [other], long_stream(server) as events:
        server.wait_until(lambda: server.metric("vcli:num_requests_running") == 2)
        killer = server.post(COMPLETIONS, json=LONG | {"cache_salt": how})
        rest = list(events)
    assert payload(rest[-1])["error"]["code"] == "engine_dead"
    for reply in (killer, other.result()):
        assert reply.status_code == 500
        assert cause in reply.json()["error"]["message"]
    assert server.process.wait(20) == 1
    assert server.log.strip().splitlines()[-1].startswith("vcli: ")
    assert cause in server.log.strip().splitlines()[-1]


def test_a_request_that_ends_engines_gets_a_reference_and_its_repeats_are_refused(start_server):
    server = start_server(FAKE_STEP_S="0.01").wait_ready()
    with asking(server, 2) as others:
        server.wait_until(lambda: server.metric("vcli:num_requests_running") == 2)
        bad = server.post(COMPLETIONS, json=LONG | {"cache_salt": "fail"})
        again = server.post(COMPLETIONS, json=LONG | {"cache_salt": "fail"})
    assert [other.result().status_code for other in others] == [200, 200]
    assert (bad.status_code, bad.json()["error"]["code"]) == (500, "quarantined")
    reference = bad.json()["error"]["message"].rsplit(maxsplit=1)[-1]
    assert f"(reference {reference}: 5 prompt tokens, 1 sequences with 0 tokens given, " in server.log
    assert (again.status_code, again.json()["error"]["code"]) == (422, "quarantined")
    assert reference in again.json()["error"]["message"]
    assert int(again.headers["retry-after"]) > 0
    assert server.metric("vcli:quarantined_requests_total") == 1
    assert server.metric("vcli:admission_rejections_total") == 1


def test_an_engine_that_dies_is_replaced_and_streams_go_on(start_server):
    server = start_server(FAKE_STEP_S="0.02", FAKE_LOAD_S="0.5").wait_ready()
    with long_stream(server) as events:
        server.engine.kill()
        server.wait_until(lambda: server.get("/ready").json()["status"] == "restarting")
        assert server.get("/health").status_code == 200
        late = server.post(COMPLETIONS, json=LONG | {"max_tokens": 5})  # it waits for the new engine
        rest = list(events)
    check_all_came(server, rest)
    assert late.status_code == 200
    assert server.metric("vcli:engine_restarts_total") == 1
    assert "ended by SIGKILL (often the system's answer to too little memory); the engine starts again (1" in server.log


def test_an_engine_that_hangs_is_replaced(start_server):
    server = start_server("--step-timeout", "1s", FAKE_STEP_S="0.02").wait_ready()
    with long_stream(server) as events:
        server.engine.suspend()
        rest = list(events)
    assert rest[-1] == "data: [DONE]"
    assert "the engine made no step for 1 s; the engine starts again (1 unfinished sequences)" in server.log
    time.sleep(1.5)  # an engine without work is silent, and lives
    assert server.metric("vcli:engine_restarts_total") == 1


def test_an_operator_restarts_the_engine_and_streams_go_on(start_server):
    port = free_port()
    flags = ("--admin-address", str(port), "--max-restarts", "0")
    server = start_server(*flags, FAKE_STEP_S="0.02", FAKE_LOAD_S="0.3").wait_ready()
    admin = f"http://127.0.0.1:{port}/admin/restart-engine"
    with long_stream(server) as events:
        before = server.engine.pid
        replies = [httpx.post(admin, timeout=30) for _ in range(2)]
        rest = list(events)
    for reply in replies:
        assert (reply.status_code, reply.json()["status"]) == (200, "restarted")
        assert reply.json()["unfinished_sequences"] == 1
    assert server.engine.pid != before
    check_all_came(server, rest)
    assert server.post("/admin/restart-engine").status_code == 404, "not here"


def test_an_engine_that_dies_for_good_while_draining_is_no_good_end(start_server):
    server = start_server("--max-restarts", "0", FAKE_STEP_S="0.05").wait_ready()
    with long_stream(server) as events:
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: "may finish" in server.log)
        server.engine.kill()
        last = list(events)[-1]
    assert payload(last)["error"]["code"] == "engine_dead"
    assert server.process.wait(20) == 1
    assert "SIGKILL" in server.log.strip().splitlines()[-1]


def test_an_engine_that_keeps_dying_ends_the_server(start_server):
    server = start_server("--max-restarts", "1").wait_ready()
    server.engine.kill()
    server.wait_until(lambda: server.metric("vcli:engine_restarts_total") == 1)
    server.wait_ready()
    server.engine.kill()
    assert server.process.wait(20) == 1
    assert "SIGKILL" in server.log.strip().splitlines()[-1]


def test_taken_port_is_one_sentence_and_exit_code_1(start_server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = start_server(port=port)
        assert server.process.wait(30) == 1
    assert server.log == f"vcli: port {port} is taken: choose another with --port\n"


def test_strange_host_is_one_sentence_and_exit_code_1(start_server):
    server = start_server("--host", "203.0.113.7")
    assert server.process.wait(30) == 1
    assert server.log.startswith("vcli: --host 203.0.113.7 is no address of this machine")


def test_full_queue_says_come_back_later(start_server):
    server = start_server("--max-num-seqs", "1", "--max-queue", "1", FAKE_STEP_S="0.02").wait_ready()
    with asking(server, 2):
        server.wait_until(lambda: server.metric("vcli:num_requests_waiting") == 1)
        refused = server.post(COMPLETIONS, json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert server.post(COMPLETIONS, json={"prompt": "a", "n": 3}).status_code == 400
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_api_key_guards_all_but_the_probes(start_server):
    server = start_server(VCLI_API_KEY="secret").wait_ready()
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        reply = server.post(COMPLETIONS, json=body, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert server.post(COMPLETIONS, json=body, headers={"authorization": "Bearer secret"}).status_code == 200
    assert {server.get(path).status_code for path in ("/v1/models", "/metrics", "/version")} == {401}
    assert {server.get(path).status_code for path in ("/health", "/ready")} == {200}


def test_operators_chat_template_replaces_the_models(start_server, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    server = start_server("--chat-template", str(template)).wait_ready()
    tokens = server.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    assert server.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "<x>"


def test_server_without_tokenizer_takes_token_ids_alone(start_server):
    server = start_server("--skip-tokenizer-init").wait_ready()
    [choice] = server.post(COMPLETIONS, json={"prompt": [5, 6], "max_tokens": 2, "logprobs": 1}).json()["choices"]
    assert choice["token_ids"] == [5, 6]
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]
    refused = server.post(COMPLETIONS, json={"prompt": "text"})
    assert refused.status_code == 400
    assert "--skip-tokenizer-init" in refused.json()["error"]["message"]


def test_the_startup_timeline_of_each_process_adds_up_to_the_wall_clock(start_server):
    started = time.time()
    server = start_server("--explain-startup", FAKE_LOAD_S="0.5").wait_ready()
    server.wait_until(lambda: server.log.count(" all ") == 2)
    wall_s = time.time() - started
    rows = [line.rsplit(maxsplit=2) for line in server.log.splitlines() if line.startswith(("api ", "engine "))]
    for process in ("api", "engine"):
        *stages, total = [(name, float(start), float(took)) for name, start, took in rows if name.startswith(process)]
        assert sum(took for _, _, took in stages) == pytest.approx(total[2])
        assert 0.5 < total[2] <= wall_s + 0.02  # the system counts in hundredths
        ends = [start + took for _, start, took in stages]
        assert ends[:-1] == pytest.approx([start for _, start, _ in stages[1:]])
    assert any(name.split(maxsplit=1)[1] == "loading weights" for name, _, _ in rows)
