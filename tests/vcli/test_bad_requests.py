"""What clients can do wrong, over raw HTTP: each gets an error in OpenAI's shape, and the server goes on."""

import asyncio
import json
import random
import socket
import string

import httpx
import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = "response_format.json_schema"


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


@pytest.fixture(scope="module")
def server(start_server):
    server = start_server("--max-num-seqs", "64", FAKE_STEP_S="0.002").wait_ready()
    yield server
    assert server.post(COMPLETIONS, json={"prompt": "still there?"}).status_code == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "-1"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature", "must be float, got str"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "0"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        (COMPLETIONS, {"prompt": "a", "top_k": 10**30}, "top_k", "<="),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "b"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True}, "use_beam_search", "true"),
        (COMPLETIONS, {"prompt": "a", "best_of": 129}, "best_of", "129"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "n": 3}, "best_of", "between n (3) and 128, got 2"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "stream"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 2, "stream": True}, "prompt_logprobs", "stream"),
        (COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "got 0"),
        (COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "1 to 511, got 513"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 1000}, "logprobs", "1000"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"100000": 1}}, None, "100,000"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "100"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop", "empty"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 100}, "stop", "100"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [99999]}, None, "99,999"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (COMPLETIONS, {"prompt": "a", "guided_json": {"type": "foo"}}, "guided_json", "Invalid type: foo"),
        (COMPLETIONS, {"prompt": "a", "guided_json": '{"type": '}, "guided_json", "not valid JSON"),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "ab("}, "guided_regex", "unclosed group (at character 3)"),
        (COMPLETIONS, {"prompt": "a", "guided_choice": ["a", ""]}, "guided_choice", "empty"),
        (COMPLETIONS, {"prompt": "a", "guided_grammar": "start: b"}, "guided_grammar", 'unknown name: "b"'),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "a", "min_tokens": 1}, "min_tokens", "beside a grammar"),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "one form"),
        (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "unclosed"),
        (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": 5}}, "structured_outputs.regex", "must be str"),
        (COMPLETIONS, {"prompt": "a", "structured_outputs": {"json": 5}}, "structured_outputs.json", "got int"),
        (COMPLETIONS, {"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "1 to"),
        (COMPLETIONS, {"prompt": "a", "allowed_token_ids": [99999]}, None, "99,999"),
        (COMPLETIONS, {"prompt": "a", "bad_words": [" "]}, "bad_words", "empty"),
        (COMPLETIONS, {"prompt": "a", "min_tokens": 20, "max_tokens": 10}, "min_tokens", "20"),
        (COMPLETIONS, {"prompt": []}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": ""}, None, "empty"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "list"),
        (COMPLETIONS, {"prompt": [1, 99999]}, None, "99,999"),
        (COMPLETIONS, {"prompt": [-1]}, None, "-1"),
        (COMPLETIONS, {}, "prompt", "required"),
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": []}, "messages", "at least one"),
        (CHAT, {"messages": "hello"}, "messages", "list"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", "role"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "int"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "image_url",
        ),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function", "is required"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format", "xml"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format", "is missing"),
        (
            CHAT,
            {"messages": HELLO, "response_format": schema_format({"properties": {"a": {"items": {"type": "foo"}}}})},
            "response_format",
            "at properties.a.items: Invalid type: foo",
        ),
        (CHAT, {"messages": HELLO, "response_format": schema_format({"enum": ["x" * 200_000]})}, SCHEMA, "131,072"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 99}, "top_logprobs", "99"),
        (CHAT, {"messages": HELLO, "chat_template": "{{ x }}"}, "chat_template", "{{ x }}"),
        (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ],
)
def test_bad_value_is_named(server, path, body, param, words):
    reply = server.post(path, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\x00" * 1000,
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": 1e999, "messages": 1e999, "tokens": 1e999}',
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a"} trailing',
        random.Random(0).randbytes(1_000_000),
        b"[" * 1_000_000,
        b'{"prompt": ' + b'{"a":' * 50_000,
    ],
    ids=lambda body: f"{body[:12]!r}-{len(body)}",
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/messages", "/tokenize", "/detokenize"])
def test_garbage_is_a_bad_request(server, path, body):
    reply = server.post(path, content=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("value", ["1" + "0" * 30, "-1" + "0" * 4000, "1.5e308", "[" * 900 + "]" * 900, '"\\u0000"'])
def test_any_value_goes_to_a_template_that_does_not_use_it(server, value):
    message = HELLO[0] | {"tool_calls": [{"x": "VALUE"}]}
    body = {"messages": [message], "max_tokens": 1, "chat_template_kwargs": {"x": "VALUE"}}
    reply = server.post(CHAT, content=json.dumps(body).replace('"VALUE"', value))
    assert reply.status_code in (200, 400), reply.text


def test_too_large_a_body_is_refused_before_it_is_sent(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_too_large_a_body_without_a_length_is_refused(server):
    def chunks():
        for _ in range(40):
            yield b" " * 2**20

    assert server.post(COMPLETIONS, content=chunks()).status_code == 413


def test_huge_prompt_is_refused_without_reading_it_all(server):
    reply = server.post(COMPLETIONS, json={"prompt": "word " * 700_000})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_path_and_wrong_method_are_errors_of_the_same_shape(server):
    for reply, status in [(server.get("/v1/nothing"), 404), (server.get(CHAT), 405), (server.post("/health"), 405)]:
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_no_http_at_all_hurts_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    for words in (b"hello\r\n\r\n", random.Random(1).randbytes(10_000), b"GET / HTTP/9.9\r\n\r\n", b""):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(words)
    assert server.get("/health").status_code == 200


def test_random_bodies_never_cause_a_server_error(server):
    """Every field with every kind of value: refused or served, never a 5xx."""
    values = [None, True, 0, 1, -1, 10**19, 0.5, 1e300, "", "a", "ü\x00\u2028", [], ["a"], [1], [[1, 2]], [None], {}]
    values += [{"1": 1}, {"type": "text"}, [{"role": "user"}], [{"role": "user", "content": "x"}], [{"type": "text"}]]
    fields = ["prompt", "messages", "n", "stop", "logit_bias", "seed", "top_p", "logprobs", "echo", "stream", "model"]
    fields += ["max_tokens", "min_tokens", "stop_token_ids", "prompt_logprobs", "tools", "priority", "cache_salt"]
    fields += ["chat_template_kwargs", "stream_options", "add_generation_prompt", "continue_final_message", "user"]
    rng = random.Random(2)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(400):
            path, needed = rng.choice([(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a b"})])
            body = {"max_tokens": 2} | needed | {name: rng.choice(values) for name in rng.sample(fields, 3)}
            reply = client.post(path, json=body)
            assert reply.status_code in (200, 400, 404), (body, reply.text)
            if body.get("stream") is not True or reply.status_code != 200:
                assert isinstance(reply.json(), dict)
        for _ in range(100):
            junk = "".join(rng.choices(string.printable, k=rng.randrange(200)))
            assert client.post(rng.choice([CHAT, COMPLETIONS]), content=junk).status_code == 400


def test_client_that_leaves_mid_stream_frees_its_place(server):
    body = {"prompt": "a b c", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 3}
    aborted = server.metric('vcli:request_success_total{finished_reason="abort"')
    with httpx.stream("POST", server.url + COMPLETIONS, json=body) as reply:
        next(reply.iter_bytes())
    server.wait_until(lambda: server.metric('vcli:request_success_total{finished_reason="abort"') == aborted + 3)
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)


def test_client_that_leaves_before_a_whole_reply_frees_its_place(server):
    aborted = server.metric('vcli:request_success_total{finished_reason="abort"')
    body = {"prompt": ["a b c", "d"], "max_tokens": 490, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json=body, timeout=0.3)
    server.wait_until(lambda: server.metric('vcli:request_success_total{finished_reason="abort"') == aborted + 2)


def test_five_hundred_clients_at_once_are_all_served(server):
    async def ask(client: httpx.AsyncClient, index: int) -> tuple[int, str]:
        prompt = f"number {index};"
        reply = await client.post(server.url + COMPLETIONS, json={"prompt": prompt, "max_tokens": 16})
        return reply.status_code, reply.json()["choices"][0]["text"]

    async def ask_all() -> list[tuple[int, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=100) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(500)))

    for index, (status, text) in enumerate(asyncio.run(ask_all())):
        assert status == 200
        assert text.startswith(f"number {index};"[:8])
        assert f"{index};"[: len(text) - 7] in text


def test_stream_is_valid_server_sent_events(server):
    body = {"messages": HELLO, "stream": True, "max_tokens": 3}
    reply = server.post(CHAT, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"
