"""/v1/responses through OpenAI's own client. The engine behind it repeats the prompt."""

import json
import random
import time
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

LONG = {"input": "a b c d e f g", "max_output_tokens": 60, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(start_server):
    server = start_server("--log-requests", "lines", FAKE_STEP_S="0.005").wait_ready()
    yield server
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def client(server):
    return server.client


def test_a_response_says_what_a_chat_says(client):
    chat = client.chat.completions.create(
        model="",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
    )
    response = client.responses.create(model="", instructions="be brief", input="hello", metadata={"for": "you"})
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.error, response.metadata) == ("completed", None, {"for": "you"})
    assert [item.type for item in response.output] == ["message"]
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens


def test_events_come_in_order_and_make_up_the_response(client):
    with client.responses.stream(model="", input="hello there") as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events if event not in deltas] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"),
    ]
    assert len(deltas) > 3
    assert "".join(event.delta for event in deltas) == final.output_text == deltas[-1].snapshot
    assert final.output_text == client.responses.create(model="", input="hello there").output_text
    kept = client.responses.retrieve(final.id)
    assert (kept.output_text, kept.usage, kept.status) == (final.output_text, final.usage, "completed")


def test_an_answer_that_was_cut_is_incomplete(client):
    response = client.responses.create(model="", input="hello", max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 3
    *_, last = client.responses.create(model="", input="hello", max_output_tokens=3, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")
    assert last.response.output_text == response.output_text


def test_log_probabilities_come_with_the_text(client):
    asked: dict[str, Any] = {"model": "", "input": "hello", "top_logprobs": 2, "max_output_tokens": 6}
    [message] = client.responses.create(**asked).output
    tokens = message.content[0].logprobs
    assert len(tokens) == 6
    assert {len(token.top_logprobs) for token in tokens} == {2}
    events = client.responses.create(**asked, stream=True)
    streamed = [token.token for event in events if event.type.endswith("text.delta") for token in event.logprobs]
    assert streamed == [token.token for token in tokens]
    included = client.responses.create(model="", input="hello", include=["message.output_text.logprobs"])
    assert included.output[0].content[0].logprobs[0].top_logprobs == []


def test_a_response_goes_on_from_another_one(client):
    first = client.responses.create(model="", instructions="be brief", input="hello")
    second = client.responses.create(model="", input="and then?", previous_response_id=first.id)
    third = client.responses.create(model="", input="at last?", previous_response_id=second.id)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "at last?"},
    ]
    chat = client.chat.completions.create(model="", messages=messages)
    assert third.output_text == chat.choices[0].message.content
    assert third.usage.input_tokens == chat.usage.prompt_tokens, "without the instructions of the first"
    client.responses.delete(second.id)
    assert client.responses.create(model="", input="!", previous_response_id=third.id).status == "completed"
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.create(model="", input="!", previous_response_id=second.id)


def test_a_conversation_can_be_sent_item_by_item(client):
    answer = client.responses.create(model="", input="hello")
    by_item = client.responses.create(
        model="",
        input=[{"role": "user", "content": "hello"}, *answer.output, {"role": "user", "content": "and then?"}],
    )
    by_id = client.responses.create(model="", input="and then?", previous_response_id=answer.id)
    assert by_item.output_text == by_id.output_text


def test_the_tokens_of_a_prompt_are_counted_without_an_answer(client):
    asked: dict[str, Any] = {"instructions": "be brief", "input": [{"role": "user", "content": "hello"}]}
    response = client.responses.create(model="", **asked)
    assert client.responses.input_tokens.count(model="", **asked).input_tokens == response.usage.input_tokens
    follow_up: dict[str, Any] = {"input": "and then?", "previous_response_id": response.id}
    expected = client.responses.create(model="", **follow_up).usage.input_tokens
    assert client.responses.input_tokens.count(**follow_up).input_tokens == expected


def test_langchain_speaks_it(server, client):
    model = ChatOpenAI(model="", base_url=f"{server.url}/v1", api_key=SecretStr("none"), use_responses_api=True)
    whole = model.invoke("hello there")
    assert whole.text == "user\nhello there"
    assert whole.usage_metadata is not None
    pieces = list(model.stream("hello there"))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 5
    goes_on = model.model_copy(update={"use_previous_response_id": True})
    answer = goes_on.invoke([HumanMessage("hello there"), whole, HumanMessage("and then?")])
    same = client.responses.create(model="", input="and then?", previous_response_id=whole.response_metadata["id"])
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == same.usage.input_tokens > whole.usage_metadata["input_tokens"]


def test_what_led_to_a_response_is_listed(client):
    items: list[Any] = [{"role": "user", "content": str(number)} for number in range(5)]
    first = client.responses.create(model="", input=items)
    second = client.responses.create(model="", input="5", previous_response_id=first.id)
    listed = client.responses.input_items.list(second.id, order="asc", limit=2)
    texts = [item.content[0].text for item in listed]  # all pages of it
    assert texts == ["0", "1", "2", "3", "4", first.output_text, "5"]
    assert listed.has_more
    assert [item.content[0].text for item in client.responses.input_items.list(second.id)] == texts[::-1]


def test_a_response_is_there_until_it_is_deleted(client):
    response = client.responses.create(model="", input="hello")
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    client.responses.delete(response.id)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            ask(response.id)
    unstored = client.responses.create(model="", input="hello", store=False)
    with pytest.raises(openai.NotFoundError, match="store: false"):
        client.responses.retrieve(unstored.id)


def test_a_response_in_the_background_is_made_while_nobody_waits(client, server):
    response = client.responses.create(model="", background=True, **LONG)
    assert response.status == "queued"
    with pytest.raises(openai.BadRequestError, match="not done yet"):
        client.responses.create(model="", input="!", previous_response_id=response.id)
    seen = {response.status}
    while (response := client.responses.retrieve(response.id)).status in ("queued", "in_progress"):
        seen.add(response.status)
    assert (response.status, seen) == ("incomplete", {"queued", "in_progress"})
    assert response.output_text == client.responses.create(model="", **LONG).output_text


def test_a_client_that_loses_its_connection_again_and_again_gets_every_event_once(client):
    undisturbed = [event.to_dict() for event in client.responses.create(model="", stream=True, **LONG)]
    draw = random.Random(1)
    stream = client.responses.create(model="", background=True, stream=True, **LONG)
    events = [next(iter(stream))]
    stream.close()
    num_connections = 1
    while events[-1].type != "response.incomplete":
        time.sleep(draw.uniform(0, 0.05))
        num_most = draw.randint(1, 9)
        stream = client.responses.retrieve(events[0].response.id, stream=True, starting_after=len(events) - 1)
        for _, event in zip(range(num_most), stream, strict=False):
            events.append(event)
        stream.close()
        num_connections += 1
    assert num_connections > 5
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "".join(
        event["delta"] for event in undisturbed if event["type"] == "response.output_text.delta"
    )
    whole = list(client.responses.retrieve(events[0].response.id, stream=True))
    assert [event.to_dict() for event in whole] == [event.to_dict() for event in events], "and again from the start"


def test_several_may_follow_one_response(client):
    response = client.responses.create(model="", background=True, **LONG)
    first, second = (iter(client.responses.retrieve(response.id, stream=True)) for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) > 20
    assert all(one.to_dict() == other.to_dict() for one, other in pairs)


def test_a_response_goes_on_over_the_death_of_the_engine(client, server):
    undisturbed = client.responses.create(model="", **LONG)
    num_restarts = server.metric("vcli:engine_restarts_total")
    response = client.responses.create(model="", background=True, **LONG)
    events = iter(client.responses.retrieve(response.id, stream=True))
    for _ in range(10):
        next(events)
    server.engine.kill()
    *_, last = events
    assert last.response.output_text == undisturbed.output_text
    assert last.response.usage.output_tokens == undisturbed.usage.output_tokens
    assert server.metric("vcli:engine_restarts_total") == num_restarts + 1


def test_a_cancelled_response_frees_its_place_and_stays_as_far_as_it_got(client, server):
    response = client.responses.create(
        model="", input="a b c", background=True, max_output_tokens=450, extra_body={"ignore_eos": True}
    )
    events = iter(client.responses.retrieve(response.id, stream=True))
    while next(events).type != "response.output_text.delta":
        pass
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    assert 0 < cancelled.usage.output_tokens < 450
    assert "response.completed" not in [event.type for event in events], "and the stream ends"
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)
    assert client.responses.retrieve(response.id).to_dict() == cancelled.to_dict()
    assert client.responses.cancel(response.id).status == "cancelled", "a second time, too"


def test_deleting_a_response_ends_it(client, server):
    response = client.responses.create(
        model="", input="a b c", background=True, max_output_tokens=450, extra_body={"ignore_eos": True}
    )
    client.responses.delete(response.id)
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_what_was_made_for_a_client_alone_is_neither_cancelled_nor_streamed_again(client):
    response = client.responses.create(model="", input="hello")
    with pytest.raises(openai.BadRequestError, match="background: true can be cancelled"):
        client.responses.cancel(response.id)
    with pytest.raises(openai.BadRequestError, match="not made with background"):
        client.responses.retrieve(response.id, stream=True)


def test_the_log_has_a_line_for_what_went_on_in_the_background(client, server):
    response = client.responses.create(model="", background=True, **LONG)
    server.wait_until(lambda: f'"id":"{response.id}"' in server.log)
    lines = [json.loads(line.partition(": ")[2]) for line in server.log.splitlines() if f'"{response.id}"' in line]
    assert [(line["path"], line["output_tokens"], line["finish_reasons"]) for line in lines] == [
        ("/v1/responses", 60, ["length"])
    ]


def test_a_client_may_come_back_for_a_stream_as_for_any_other(server):
    body = {"input": "hello", "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/responses", json=body, headers={"X-Reconnect-Grace-Ms": "9000"}
    ) as reply:
        ids = [line.removeprefix("id: ") for line in reply.iter_lines() if line.startswith("id: ")]
    rest = server.post("/v1/responses", json=body, headers={"Last-Event-ID": ids[-3]}).text
    assert [line for line in rest.splitlines() if line.startswith("event:")] == [
        "event: response.output_item.done",
        "event: response.completed",
    ]


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({}, None, "input is required"),
        ({"input": ""}, "input", "some text"),
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"content": "hi"}]}, "input[0].role", "got nothing"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role", "'robot'"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0]",
            "reads text only",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "call_id"),
        (
            {"input": [{"type": "function_call", "name": "f", "call_id": "1", "arguments": '{"at": '}]},
            "input[0].arguments",
            "a JSON object, got '{\"at\": '",
        ),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0]", "call_id"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"input": "hi", "tools": [{"type": "function"}]}, "tools[0].name", "needs a name"),
        ({"input": "hi", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "schema"),
        ({"input": "hi", "background": True, "store": False}, "store", "nobody could get"),
        ({"input": "hi", "conversation": "conv_1"}, "conversation", "not supported"),
        ({"input": "hi", "truncation": "auto"}, "truncation", "not supported"),
        ({"input": "hi", "metadata": {"x" * 65: ""}}, "metadata", "64"),
        ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must"),
        ({"input": "hi", "temperature": -1}, "temperature", "-1"),
        ({"input": "hi", "top_logprobs": 99}, "top_logprobs", "99"),
        ({"input": "hi " * 2000, "background": True}, None, "512"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, asked, param, words):
    reply = server.post("/v1/responses", json=asked)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["param"] == param or param is None


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("?stream=maybe", 400),
        ("?stream=true&starting_after=-1", 400),
        ("?starting_after=1", 400),
        ("/input_items?limit=0", 400),
        ("/input_items?limit=many", 400),
        ("/input_items?order=up", 400),
        ("/input_items?after=item_99", 400),
        ("x", 404),
    ],
)
def test_what_cannot_be_shown_is_refused(server, client, path, status):
    response = client.responses.create(model="", input="hello", background=True)
    assert server.get(f"/v1/responses/{response.id}{path}").status_code == status


def test_other_tenants_do_not_see_a_response(start_server, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkeys = ["key-of-alice-0001"]\n[bob]\nkeys = ["key-of-bob-00000001"]\n')
    server = start_server("--api-key-file", str(keys), FAKE_STEP_S="0.005").wait_ready()
    alice, bob = (server.client.with_options(api_key=key) for key in ("key-of-alice-0001", "key-of-bob-00000001"))
    response = alice.responses.create(model="", input="secret", background=True)
    responses = bob.responses
    for ask in (responses.retrieve, responses.cancel, responses.delete, responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask(response.id)
    with pytest.raises(openai.NotFoundError):
        responses.create(model="", input="what was it?", previous_response_id=response.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(response.id, stream=True)
    assert "secret" in list(alice.responses.retrieve(response.id, stream=True))[-1].response.output_text
