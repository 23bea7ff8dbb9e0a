"""Answers that are more than text, through OpenAI's client. The engine repeats the prompt: a test writes both."""

import pytest

from vcli.server.chat import answer_form
from vcli.server.dialects import dialect_of
from vcli.server.protocol import ChatRequest

TEMPLATE = "{{ messages[-1].content }}<|im_end|>{% if marks %}<think></think>{% endif %}"


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    """Whose model answers with the last message, word by word."""
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    return start_server("--chat-template", str(template)).wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return server.client


def ask(client, text, **arguments):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="", messages=messages, max_tokens=300, **arguments)


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
