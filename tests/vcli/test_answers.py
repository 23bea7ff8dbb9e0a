"""Answers that are more than text, through OpenAI's client. The engine repeats the prompt: a test writes both."""

import json

import openai
import pytest
from langchain_openai import ChatOpenAI

from vcli.server.chat import answer_form
from vcli.server.dialects import dialect_of
from vcli.server.protocol import ChatMessage, ChatRequest

TEMPLATE = "{{ messages[-1].content }}<|im_end|>{% if marks %}{{ tools }}<think></think><tool_call>{% endif %}"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    """Whose model answers with the last message, word by word."""
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    return start_server("--chat-template", str(template), "--max-model-len", "2048").wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return server.client


def ask(client, text, **arguments):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="", messages=messages, max_tokens=500, **arguments)


def test_thoughts_come_apart_from_the_answer_whole_and_streamed(client):
    text = "<think>\nIs it é?\n</think>\n\nYes: é."
    [choice] = ask(client, text).choices
    assert choice.message.content == "Yes: é."
    assert choice.message.reasoning_content == choice.message.reasoning == "Is it é?"
    assert choice.finish_reason == "stop"
    events = [event.choices[0] for event in ask(client, text, stream=True)]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == "Yes: é."
    assert "".join(getattr(event.delta, "reasoning_content", "") for event in events) == "Is it é?"
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]


def test_thoughts_are_left_out_where_nobody_wants_them(client):
    [choice] = ask(client, "<think>Hm.</think>Yes.", extra_body={"include_reasoning": False}).choices
    assert choice.message.content == "Yes."
    assert not hasattr(choice.message, "reasoning_content")


def test_a_prompt_may_open_the_thoughts():
    dialect = dialect_of("{{ '<think>' }}{{ content.split('</think>')[-1] }}")
    request = ChatRequest(messages=[])
    is_thinking = {
        prompt: answer_form(dialect, prompt, request).is_thinking for prompt in ("<think>\n", "<think></think>")
    }
    assert is_thinking == {"<think>\n": True, "<think></think>": False}
    goes_on = {}
    for text in ("<think>\nSo", "<think>\nSo</think>It", "It"):
        request = ChatRequest(messages=[ChatMessage("assistant", text)], continue_final_message=True)
        goes_on[text] = answer_form(dialect, text, request).is_thinking
    assert list(goes_on.values()) == [True, False, False]
    assert answer_form(dialect_of("{{ messages }}"), "<think>", request) is None


def test_an_answer_is_as_it_is_where_nobody_thinks(client):
    for text in ("  Yes.\n ", "I <think> so.", "<thin"):
        assert ask(client, text).choices[0].message.content == text
        events = ask(client, text, stream=True)
        assert "".join(event.choices[0].delta.content or "" for event in events) == text


def test_every_event_has_its_log_probabilities_even_without_text(client):
    events = [event.choices[0] for event in ask(client, "<think>Hm.</think>Yes.", stream=True, logprobs=True)]
    whole = ask(client, "<think>Hm.</think>Yes.", logprobs=True).choices[0].logprobs.content
    assert [token.token for event in events for token in event.logprobs.content] == [token.token for token in whole]


def test_calls_come_whole_with_their_arguments(client):
    [choice] = ask(client, f"Let me look.\n{CALL}\n{CALL}", tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    first, second = choice.message.tool_calls
    assert first.function.name == "get_weather"
    assert json.loads(first.function.arguments) == {"city": "Zürich"}
    assert first.id != second.id
    [choice] = ask(client, CALL, tools=TOOLS).choices
    assert choice.message.content is None


def test_calls_stream_piece_by_piece_and_add_up(client):
    """As OpenAI's own accumulation sees them."""
    with client.chat.completions.stream(
        model="", messages=[{"role": "user", "content": f"Look.\n{CALL}\n{CALL}"}], max_tokens=500, tools=TOOLS
    ) as stream:
        events = list(stream)
        [choice] = stream.get_final_completion().choices
    pieces = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert [json.loads(call) for call in "".join(pieces).replace("}{", "}\n{").split("\n")] == [{"city": "Zürich"}] * 2
    assert choice.message.content == "Look."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"city": "Zürich"}] * 2
    assert choice.finish_reason == "tool_calls"
    assert "tool_call" not in (choice.message.content or "")


def test_what_nobody_may_call_is_text(client):
    assert ask(client, CALL).choices[0].message.content == CALL
    assert ask(client, CALL, tools=TOOLS, tool_choice="none").choices[0].message.content == CALL
    other = [{"type": "function", "function": {"name": "other"}}]
    [choice] = ask(client, CALL, tools=other).choices
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


def test_a_call_that_is_cut_off_says_so(client):
    messages = [{"role": "user", "content": CALL}]
    [choice] = client.chat.completions.create(model="", messages=messages, max_tokens=30, tools=TOOLS).choices
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS * 2}, "tools[1].function.name"),
        ({"tools": TOOLS * 200}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "browser", "function": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "tools[0].function.parameters"),
    ],
)
def test_a_wrong_tool_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hi", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("arguments", ["[1]", "{", 5, '"a"', '{"a": NaN}', '{"a": "\\ud83d"}'])
def test_a_call_of_the_past_has_an_object_of_arguments(server, arguments):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    reply = server.post("/v1/chat/completions", json={"messages": messages})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def test_langchain_calls_tools_and_streams_them(server):
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="", max_tokens=500, max_retries=0)
    with_tools = model.bind_tools([WEATHER])
    message = with_tools.invoke(f"Look.\n{CALL}")
    assert message.content == "Look."
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("get_weather", {"city": "Zürich"})]
    chunks = list(with_tools.stream(f"Look.\n{CALL}"))
    whole = sum(chunks[1:], chunks[0])
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Zürich"})]
