"""Anthropic's Messages API through its own client. The engine behind it repeats the prompt."""

import json
import random
from collections import Counter

import anthropic
import httpx
import pytest

# What a conversation has become can be read in the answer: the contents in a row, or all there is if system says so.
TEMPLATE = """\
{#- Answers may begin with thoughts, <think> and </think>, and hold calls: <tool_call>. -#}
{%- if messages[0].role == "system" and messages[0].content == "show all" -%}
{{ {"messages": messages[1:], "tools": tools, "enable_thinking": enable_thinking | default(none)} | tojson }}
{%- else -%}
{%- for message in messages %}{{ message.content }}{% endfor -%}
{%- endif -%}"""
HELLO = [{"role": "user", "content": "hello to you"}]


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ["--chat-template", str(template), "--max-model-len", "2048"]
    return start_server(*flags, FAKE_STEP_S="0.0002").wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def client_of(server, api_key="none"):
    return anthropic.Anthropic(base_url=server.url, api_key=api_key, max_retries=0, timeout=60)


def seen(client, messages, **asked):
    """What the template is given."""
    asked |= {"model": "", "messages": messages, "system": "show all"}
    num_tokens = client.messages.count_tokens(**asked).input_tokens
    [block] = client.messages.create(**asked, max_tokens=num_tokens).content
    return json.loads(block.text)


def test_message_comes_whole_with_its_counts(client):
    num_tokens = client.messages.count_tokens(model="", messages=HELLO).input_tokens
    message = client.messages.create(model="", messages=HELLO, max_tokens=num_tokens)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "hello to you"}]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "max_tokens", None)
    assert message._request_id == message.id
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == usage.output_tokens == num_tokens


def test_stream_adds_up_to_the_whole(client):
    asked = {"model": "", "messages": HELLO, "max_tokens": 40}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        streamed = stream.get_final_message()
    assert streamed.to_dict(exclude_none=True) | {"id": ""} == whole.to_dict(exclude_none=True) | {"id": ""}
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_events_are_named_by_their_types(server):
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    events = server.post("/v1/messages", json=body).text.split("\n\n")
    for event in filter(None, events):
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_stream_that_was_lost_is_read_on(server):
    """By the machinery of every stream, see test_replay.py."""
    body = {"messages": HELLO, "max_tokens": 20, "stream": True}
    whole = server.post("/v1/messages", json=body, headers={"X-Reconnect-Grace-Ms": "9000"})
    events = [event for event in whole.text.split("\n\n") if event]
    seen = events[len(events) // 2].split("\n")[0].removeprefix("id: ")
    rest = server.post("/v1/messages", json=body, headers={"Last-Event-ID": seen})
    assert [event for event in rest.text.split("\n\n") if event] == events[len(events) // 2 + 1 :]


def test_stop_sequence_ends_the_message_and_is_named(client):
    message = client.messages.create(model="", messages=HELLO, max_tokens=40, stop_sequences=["nowhere", " to"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("hello", "stop_sequence", " to")


def test_end_of_the_models_own_and_full_context_have_names(client):
    message = client.messages.create(model="", messages=[{"role": "user", "content": "a<|im_end|>"}], max_tokens=9)
    assert (message.content[0].text, message.stop_reason) == ("a", "end_turn")
    message = client.messages.create(model="", messages=[{"role": "user", "content": "ab " * 600}], max_tokens=9000)
    assert message.stop_reason == "model_context_window_exceeded"


def test_turns_become_messages(client):
    assert seen(
        client,
        [
            {"role": "user", "content": [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]},
            {"role": "user", "content": "two"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "?"},
                    {"type": "text", "text": "three"},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": [1, "é"]}},
                    {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "4"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no a", "is_error": True},
                    {"type": "text", "text": "five"},
                ],
            },
        ],
    )["messages"] == [
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "three",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": [1, "é"]}}},
                {"id": "t2", "type": "function", "function": {"name": "add", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "t1"},
        {"role": "tool", "content": "Error: no a", "tool_call_id": "t2"},
        {"role": "user", "content": "five"},
    ]


def test_documents_and_search_results_are_read_as_text(client):
    source = {"type": "text", "media_type": "text/plain", "data": "It rains."}
    found = {"type": "search_result", "source": "a.org", "title": "A", "content": [{"type": "text", "text": "So?"}]}
    document = {"type": "document", "source": source, "title": "Weather", "citations": {"enabled": False}}
    [turn] = seen(client, [{"role": "user", "content": [document, found]}])["messages"]
    assert turn["content"] == "Weather\nIt rains.\nA (a.org)\nSo?"
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}}
    with pytest.raises(anthropic.BadRequestError, match="got a block of type 'document'"):
        seen(client, [{"role": "user", "content": [pdf]}])


def test_system_text_comes_first(client):
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]
    message = client.messages.create(model="", messages=HELLO, system=system, max_tokens=20)
    assert message.content[0].text.startswith("Be\nkind.hello")


def test_last_turn_of_the_assistant_is_continued(client, server):
    messages = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    message = client.messages.create(model="", messages=messages, max_tokens=40)
    assert message.content[0].text.startswith("hello to youThe answer is (hello")


def test_thoughts_have_a_block_of_their_own(client):
    asked = {"model": "", "messages": [{"role": "user", "content": "<think>\nhm, so\n</think>\n\nhello"}]}
    asked["max_tokens"] = client.messages.count_tokens(**asked).input_tokens
    thinking, text = client.messages.create(**asked).content
    assert (thinking.type, thinking.thinking, text.type, text.text) == ("thinking", "hm, so", "text", "hello")
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream if event.type in ("thinking", "text", "content_block_stop")]
        streamed = stream.get_final_message()
    assert [block.to_dict(exclude_none=True) for block in streamed.content] == [thinking.to_dict(), text.to_dict()]
    assert list(dict.fromkeys(kinds)) == ["thinking", "content_block_stop", "text"]
    omitted = {"type": "adaptive", "display": "omitted"}
    assert [block.type for block in client.messages.create(**asked, thinking=omitted).content] == ["text"]


ADD = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}}
CALLS = """Well:
<tool_call>
{"name": "add", "arguments": {"a": [1, "é"]}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {}}
</tool_call><|im_end|>"""


def test_tools_are_told_to_the_model(client):
    function = {"name": "add", "description": "Adds.", "parameters": ADD["input_schema"]}
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "add"}):
        told = seen(client, HELLO, tools=[ADD | {"type": "custom"}], tool_choice=choice)
        assert told["tools"] == [{"type": "function", "function": function}]
    assert seen(client, HELLO, tools=[ADD], tool_choice={"type": "none"})["tools"] is None
    with pytest.raises(anthropic.BadRequestError, match="'sub'"):
        seen(client, HELLO, tools=[ADD], tool_choice={"type": "tool", "name": "sub"})


def test_calls_of_tools_are_blocks(client):
    asked = {"model": "", "messages": [{"role": "user", "content": CALLS}], "max_tokens": 200, "tools": [ADD]}
    whole = client.messages.create(**asked)
    text, first, second = whole.content
    assert (text.text, whole.stop_reason) == ("Well:", "tool_use")
    assert [(call.name, call.input) for call in (first, second)] == [("add", {"a": [1, "é"]}), ("add", {})]
    assert first.id != second.id
    with client.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert len(pieces) > 4, "they come as they are written"
    assert "".join(pieces) == '{"a": [1, "é"]}{}'
    assert [getattr(block, "input", None) for block in streamed.content] == [None, first.input, second.input]
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)


def test_call_that_max_tokens_cuts_off_has_no_input(client):
    def asked(text):
        return {"model": "", "messages": [{"role": "user", "content": text}], "tools": [ADD]}

    num_tokens = client.messages.count_tokens(**asked(CALLS[: CALLS.index("é")])).input_tokens
    message = client.messages.create(**asked(CALLS), max_tokens=num_tokens)
    assert (message.content[-1].name, message.content[-1].input, message.stop_reason) == ("add", {}, "max_tokens")
    with client.messages.stream(**asked(CALLS), max_tokens=num_tokens) as stream:
        assert [event.snapshot for event in stream if event.type == "input_json"][-1] == {"a": [1]}


def test_clients_own_loop_runs_tools_and_sends_what_they_gave(client):
    """It asks the API in beta, and for the server to keep the conversation, but does without."""

    @anthropic.beta_tool
    def add(a: list) -> str:
        """Adds."""
        return f"It is {a}."

    call = CALLS[: CALLS.index("</tool_call>")] + "</tool_call>"
    runner = client.beta.messages.tool_runner(
        model="",
        messages=[{"role": "user", "content": call + "<|im_end|>"}],
        tools=[add],
        max_tokens=200,
        max_iterations=2,
    )
    first, second = list(runner)
    assert [block.type for block in first.content] == ["text", "tool_use"]
    assert second.usage.input_tokens > first.usage.input_tokens, "it has got the call and its result, too"


@pytest.mark.parametrize("kind", ["enabled", "adaptive", "disabled"])
def test_thinking_is_the_templates_affair(client, kind):
    thinking = {"type": kind} | ({"budget_tokens": 1024} if kind == "enabled" else {})
    assert seen(client, HELLO, thinking=thinking)["enable_thinking"] is (kind != "disabled")
    assert seen(client, HELLO)["enable_thinking"] is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"messages": HELLO}, "max_tokens is required"),
        ({"max_tokens": 1}, "messages is required"),
        ({"max_tokens": 1, "messages": []}, "at least one message"),
        ({"max_tokens": 0, "messages": HELLO}, "max_tokens must be at least 1"),
        ({"max_tokens": 1, "messages": HELLO, "temperature": -1}, "temperature"),
        ({"max_tokens": 1, "messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video'"),
        (
            {
                "max_tokens": 1,
                "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}],
            },
            "messages[0].content[0]: this model reads text only, got a block of type 'image'",
        ),
        (
            {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "?"}]}]},
            "messages[0].content[0]: a block of type 'thinking' belongs into a message of the assistant",
        ),
        (
            {
                "max_tokens": 1,
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
                ],
            },
            "send their results",
        ),
        ({"max_tokens": 1, "messages": HELLO, "tools": [{"type": "web_search_20250305", "name": "x"}]}, "web_search"),
        ({"max_tokens": 1, "messages": HELLO, "tools": [{"name": "x"}]}, "tools[0].input_schema is required"),
        ({"max_tokens": 1, "messages": HELLO, "tools": [{"name": "?", "input_schema": {}}]}, "tools[0].name must be"),
        (
            {"max_tokens": 1, "messages": HELLO, "tools": [{"name": "x", "input_schema": {"type": "all"}}]},
            "tools[0].input_schema",
        ),
        (
            {
                "max_tokens": 1,
                "messages": HELLO,
                "output_config": {"format": {"type": "json_schema", "schema": {"type": "all"}}},
            },
            "output_config.format",
        ),
        ({"max_tokens": 1, "messages": HELLO, "stop_sequences": [""]}, "stop_sequences must not hold"),
        ({"max_tokens": 1, "messages": HELLO, "thinking": {"type": "loud"}}, "loud"),
        ({"max_tokens": 1, "messages": HELLO, "thread": {"type": "create"}}, "send the whole conversation"),
        ({"max_tokens": 1, "messages": HELLO, "mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_bad_request_is_told_in_anthropics_shape(server, asked, words):
    reply = server.post("/v1/messages", json=asked)
    assert reply.status_code == 400, reply.text
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert words in reply.json()["error"]["message"]


def test_random_bodies_never_cause_a_server_error(server):
    """Every field with every kind of value: refused or served, never a 5xx."""
    values = [None, True, 0, -1, 10**19, 0.5, 1e300, "", "é\x00", [], ["a"], [None], {}, {"type": "any"}]
    deep = json.loads('{"a": ' * 400 + "1e308" + "}" * 400)
    call = {"type": "tool_use", "id": "", "name": "", "input": {"x": 10**400, "y": deep}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": []}
    blocks = [{"type": "text", "text": "a"}, call, result, {"type": "thinking", "thinking": ""}]
    values += [[block] for block in blocks]
    fields = ["max_tokens", "system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences", "stream"]
    fields += ["temperature", "top_k", "top_p", "model", "messages", "metadata"]
    rng, statuses = random.Random(3), Counter[int]()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for index in range(200):
            content = [rng.choice(blocks) for _ in range(rng.randrange(3))]
            turns = [{"role": rng.choice(["user", "assistant", "system"]), "content": content}, *HELLO]
            body = {"max_tokens": 2, "messages": turns} | {name: rng.choice(values) for name in rng.sample(fields, 1)}
            reply = client.post("/v1/messages" + "/count_tokens" * (index % 2), content=json.dumps(body))
            statuses[reply.status_code] += 1
            if reply.status_code != 200:
                assert reply.json()["type"] == "error"
    assert statuses.keys() <= {200, 400, 404}
    assert statuses[200] > 30


def test_model_is_listed(client, model_folder):
    [entry] = client.models.list()
    assert entry == client.models.retrieve(str(model_folder))
    assert (entry.id, entry.max_input_tokens, entry.lifecycle) == (str(model_folder), 2048, "active")
    assert entry.created_at.year >= 2025


def test_what_it_does_not_know_is_ignored(server):
    extras = {"metadata": {"user_id": "me"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}
    body = {"messages": HELLO, "max_tokens": 1, "container": None, "inference_geo": "eu"} | extras
    assert server.post("/v1/messages", json=body).status_code == 200


def test_errors_have_their_types(client):
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude-9", messages=HELLO, max_tokens=1)
    assert (caught.value.type, caught.value.error_code) == ("not_found_error", "model_not_found")
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="", messages=[{"role": "user", "content": "ab" * 4096}], max_tokens=1)
    assert "2,048" in str(caught.value)
    assert caught.value.error_code == "context_length_exceeded"


def test_a_wrong_method_and_path_are_told_in_its_shape_too(server):
    assert server.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/messages/batches").json()["error"]["type"] == "not_found_error"
    assert "type" not in server.post("/v1/messagesx").json()


def test_stream_that_fails_ends_with_an_error_event(start_server):
    server = start_server("--max-restarts", "0", FAKE_STEP_S="0.05").wait_ready()
    messages = [{"role": "user", "content": "hello " * 100}]
    events = client_of(server).messages.create(model="", messages=messages, max_tokens=400, stream=True)
    assert next(iter(events)).type == "message_start"
    server.engine.kill()
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(events)
    assert (caught.value.type, caught.value.error_code) == ("api_error", "engine_dead")


def test_key_may_come_as_x_api_key(start_server):
    key = "sk-of-this-server"
    server = start_server("--api-key", key).wait_ready()
    assert client_of(server, key).messages.create(model="", messages=HELLO, max_tokens=9).content
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client_of(server, "sk-of-another").messages.create(model="", messages=HELLO, max_tokens=9)
    assert caught.value.type == "authentication_error"
    bearer = anthropic.Anthropic(base_url=server.url, auth_token=key)
    assert bearer.messages.create(model="", messages=HELLO, max_tokens=9).content
