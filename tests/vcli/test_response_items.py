"""Responses as items: what OpenAI's client reads of the events, what a conversation is made of, what is kept."""

import asyncio
from typing import Any

import httpx
import msgspec
import openai
import pytest

from engine.outputs import OutputDelta
from vcli.server import streaming
from vcli.server.chat import Prompt
from vcli.server.dialects import CALL_FORMATS, Marks
from vcli.server.parts import AnswerForm
from vcli.server.protocol import ApiError, Function, Tool
from vcli.server.replay import Replays
from vcli.server.responses import store
from vcli.server.responses.protocol import InputItem, ResponsesRequest, as_messages
from vcli.server.responses.reply import ResponseReply
from vcli.server.responses.store import ResponseStore, Stored
from vcli.server.tools import ToolUse, tool_use


def empty_reply(form: AnswerForm | None) -> ResponseReply:
    asked = ResponsesRequest(input="?", stream=True)
    prompts = [Prompt([1], None, form)]
    return ResponseReply(asked, lambda reply: None, {}, model="m", prompts=prompts, n=1, tokenizer=None)


def answer(reply: ResponseReply, text: str, *, most: int = 3, finish_reason: str | None = "stop") -> bytes:
    """The events of a reply to whom this text was given, so many characters at a time."""
    pieces = [text[start : start + most] for start in range(0, len(text), most)] or [""]
    events = reply.head()
    for number, piece in enumerate(pieces, start=1):
        reason = finish_reason if number == len(pieces) else None
        events += reply.event(0, OutputDelta(0, piece, [7], finish_reason=reason))
    return events + reply.tail()


def read_by_client(sent: bytes) -> tuple[list[Any], Any]:
    """What OpenAI's client makes of events: the events, and the response that it puts together of them."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=sent, headers=headers))
    client = openai.OpenAI(api_key="none", http_client=httpx.Client(transport=transport))
    with client.responses.stream(model="m", input="?") as stream:
        return list(stream), stream.get_final_response()


THINKS_AND_CALLS = AnswerForm(
    marks=Marks("<think>", "</think>"), call_format=CALL_FORMATS["hermes"], tools=ToolUse([Tool(Function("look"))])
)
CALLS = (
    '<tool_call>\n{"name": "look", "arguments": {"at": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {"at": "Oslo"}}\n</tool_call>'
)


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_thoughts_text_and_calls_are_items_of_their_own(most):
    sent = answer(empty_reply(THINKS_AND_CALLS), f"<think>two cities</think>One moment.{CALLS}", most=most)
    events, response = read_by_client(sent)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    reasoning, message, *calls = response.output
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert reasoning.content[0].text == "two cities"
    assert message.content[0].text == response.output_text == "One moment."
    assert [(call.name, call.arguments) for call in calls] == [("look", '{"at": "Rome"}'), ("look", '{"at": "Oslo"}')]
    assert len({item.id for item in response.output} | {call.call_id for call in calls}) == 6
    assert {item.status for item in response.output} == {"completed"}
    for index, item in enumerate(response.output):
        about = [event for event in events if getattr(event, "output_index", None) == index]
        assert (about[0].type, about[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert about[-1].item.to_dict().items() <= item.to_dict().items() or item is message, "but for what is parsed"
        deltas = "".join(event.delta for event in about if event.type.endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
    assert response.usage.output_tokens_details.reasoning_tokens <= response.usage.output_tokens


def test_a_client_is_kept_waiting_by_comments_between_events_with_ids(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
    sent = b""

    async def make(receive: Any, send: Any) -> None:
        reply = empty_reply(None)
        await streaming.start_events(send, reply.id)
        await streaming.send_events(send, reply.head())
        while b"still here" not in sent:
            await asyncio.sleep(0.01)
        await streaming.send_events(send, reply.event(0, OutputDelta(0, "hello", [7], finish_reason="stop")))
        await streaming.send_events(send, reply.tail(), is_last=True)

    async def keep(message: dict[str, Any]) -> None:
        nonlocal sent
        sent += message.get("body", b"")

    async def story() -> None:
        await Replays().start_in_background(make, "").follow(1, asyncio.Event().wait, keep)

    asyncio.run(asyncio.wait_for(story(), 30))
    assert b"id: resp_" in sent
    events, response = read_by_client(sent)
    assert response.output_text == "hello"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_what_was_stored_leads_to_the_same_conversation():
    """Thoughts, text and calls of an answer come back as one message of the next prompt."""
    reply = empty_reply(THINKS_AND_CALLS)
    answer(reply, f"<think>two cities</think>One moment.{CALLS}")
    [message] = as_messages(Stored(reply.id, "", b"[]", reply.json()).conversation())
    assert (message.reasoning_content, message.content) == ("two cities", "One moment.")
    calls = message.tool_calls or []
    assert [call["function"]["arguments"] for call in calls] == [{"at": "Rome"}, {"at": "Oslo"}]
    assert [call["id"] for call in calls] == [item["call_id"] for item in reply.body()["output"][2:]]


def test_an_answer_without_text_is_an_empty_message():
    [item] = read_by_client(answer(empty_reply(None), ""))[1].output
    assert (item.type, item.content[0].text) == ("message", "")


def test_a_response_that_fails_says_why_and_keeps_what_there_was():
    reply = empty_reply(None)
    reply.head()
    reply.event(0, OutputDelta(0, "some", [7]))
    last = reply.error_event(ApiError(500, "out of luck", code="engine_dead"))
    body = reply.body()
    assert b"event: response.failed" in last
    assert (body["status"], body["error"]) == ("failed", {"code": "engine_dead", "message": "out of luck"})
    assert [(item["status"], item["content"][0]["text"]) for item in body["output"]] == [("incomplete", "some")]


def test_thoughts_text_and_calls_of_one_turn_are_one_message():
    items = [
        InputItem(role="developer", content="be brief"),
        InputItem(
            role="user", content=[{"type": "input_text", "text": "weather "}, {"type": "input_text", "text": "?"}]
        ),
        InputItem(type="reasoning", content=[{"type": "reasoning_text", "text": "two cities"}]),
        InputItem(role="assistant", content=[{"type": "output_text", "text": "One moment."}]),
        InputItem(type="function_call", call_id="1", name="look", arguments='{"at": "Rome"}'),
        InputItem(type="function_call", call_id="2", name="look", arguments='{"at": "Oslo"}'),
        InputItem(type="function_call_output", call_id="1", output="sun"),
        InputItem(type="function_call_output", call_id="2", output=[{"type": "input_text", "text": "rain"}]),
        InputItem(role="assistant", content="Sun and rain."),
        InputItem(role="assistant", content="Anything else?"),
    ]
    messages = as_messages(items)
    assert [message.role for message in messages] == [
        *("developer", "user", "assistant", "tool", "tool", "assistant", "assistant"),
    ]
    turn = messages[2]
    assert (turn.reasoning_content, turn.content) == ("two cities", "One moment.")
    assert turn.tool_calls == [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "Rome"}}},
        {"id": "2", "type": "function", "function": {"name": "look", "arguments": {"at": "Oslo"}}},
    ]
    assert [(message.tool_call_id, message.content) for message in messages[3:5]] == [("1", "sun"), ("2", "rain")]
    assert messages[1].content == "weather ?"


LOOK, ADD = ({"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("look", "add"))
ONLY_ADD = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}


@pytest.mark.parametrize(
    ("choice", "callable_names", "must_call"),
    [
        (None, {"look", "add"}, False),
        ("required", {"look", "add"}, True),
        ({"type": "function", "name": "add"}, {"add"}, True),
        (ONLY_ADD, {"add"}, True),
        (ONLY_ADD | {"mode": "auto"}, {"add"}, False),
    ],
)
def test_tools_are_those_of_a_chat(choice, callable_names, must_call):
    asked = msgspec.convert({"input": "?", "tools": [LOOK, ADD], "tool_choice": choice}, ResponsesRequest)
    use = tool_use(asked.as_conversation([], ""))
    assert use is not None
    assert (use.names, use.must_call) == (callable_names, must_call)
    assert use.tools[0].function.parameters == {"type": "object"}


def test_the_form_of_the_text_is_that_of_a_chat():
    schema = {"type": "object", "properties": {"at": {"type": "string"}}}
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    asked = msgspec.convert({"input": "?", "text": {"format": form}}, ResponsesRequest)
    json_schema = {"name": "place", "schema": schema, "strict": True}
    assert asked.as_conversation([], "").response_format == {"type": "json_schema", "json_schema": json_schema}
    assert empty_reply(None).body()["text"] == {"format": {"type": "text"}}


def test_the_store_has_room_for_so_many(monkeypatch: pytest.MonkeyPatch):
    """Who has stored most loses its oldest; what is still being made stays; all of it is counted."""
    monkeypatch.setattr(store, "MAX_RESPONSES", 4)
    responses = ResponseStore()
    responses.put(Stored("running", "bob", b"[]", body=lambda: b"{}"))
    for number in range(5):
        responses.put(Stored(f"bob-{number}", "bob", b"[]", b"{}"))
        responses.check()
    responses.put(Stored("alice-0", "alice", b"[]", b"{}"))
    kept = [name for name in ("running", "alice-0", *(f"bob-{number}" for number in range(5))) if name in responses]
    assert kept == ["running", "alice-0", "bob-3", "bob-4"]
    responses.put(Stored("running", "bob", b"[]", b"{}" * 50))
    responses.check()
    for name, owner in (("running", "bob"), ("alice-0", "alice"), ("bob-3", "bob"), ("bob-4", "bob")):
        responses.remove(responses.find(name, owner))
        responses.check()


def test_the_store_has_room_for_so_much_and_keeps_it_for_so_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MAX_BYTES", 100_000)
    responses = ResponseStore()
    for number in range(10):
        responses.put(Stored(str(number), "", b"x" * 10_000, b"y" * 10_000))
    responses.check()
    assert [name for name in map(str, range(10)) if name in responses] == ["6", "7", "8", "9"]
    monkeypatch.setattr(store, "MAX_AGE_S", 0.0)
    with pytest.raises(ApiError, match="there is no response '9'"):
        responses.find("9", "")
    responses.check()
