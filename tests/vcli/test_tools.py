"""How the model hears of tools, whether its template knows them or not."""

import pytest

from engine.chat_template import render_chat
from tests.conftest import CHAT_TEMPLATE
from vcli.server.chat import template_kwargs
from vcli.server.dialects import CALL_FORMATS, dialect_of
from vcli.server.protocol import ApiError, ChatMessage, ChatRequest, Function, Tool
from vcli.server.tools import conversation, template_tools, tool_use

ADD = Tool(
    Function("add", description="The sum", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})
)
PING = Tool(Function("ping"))
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}},
    {"id": "2", "type": "function", "function": {"name": "ping", "arguments": ""}},
]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "I do.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "tool", "tool_call_id": "2", "content": "pong"},
]
QWEN = "{% if tools %}{{ tools | tojson }}{% endif %}<tool_call>{{ messages | tojson }}"


def request(**fields) -> ChatRequest:
    return ChatRequest(messages=[ChatMessage("user", "hi")], **fields)


def test_a_template_without_tools_gets_them_as_text():
    plain = conversation(
        [dict(message) for message in MESSAGES], template_tools([ADD, PING]), dialect_of(CHAT_TEMPLATE)
    )
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0]["content"].startswith("Be kind.\n\n")
    assert '{"name": "add", "description": "The sum", "parameters": {"type": "object"' in plain[0]["content"]
    assert plain[2] == {
        "role": "assistant",
        "content": 'I do.\n<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    }
    assert plain[3]["content"] == "<tool_response>\n3\n</tool_response>\n<tool_response>\npong\n</tool_response>"
    text = render_chat(CHAT_TEMPLATE, plain)
    assert text.count("<tool_call>") == 3, "one of them is the example"
    alone = conversation([{"role": "user", "content": "hi"}], template_tools([PING]), dialect_of(CHAT_TEMPLATE))
    assert [message["role"] for message in alone] == ["system", "user"]


def test_a_template_with_tools_gets_them_as_they_are():
    dialect = dialect_of(QWEN)
    assert dialect.reads_tools
    plain = conversation([dict(message) for message in MESSAGES], template_tools([ADD]), dialect)
    assert [message["role"] for message in plain] == [message["role"] for message in MESSAGES]
    assert [call["function"]["arguments"] for call in plain[2]["tool_calls"]] == [{"a": "é"}, {}], "as data"
    assert plain[2]["tool_calls"][0]["id"] == "1"


@pytest.mark.parametrize(
    ("template", "form", "reads_tools", "marks"),
    [
        (CHAT_TEMPLATE, "hermes", False, None),
        (QWEN + "{{ content.split('</think>') }}", "hermes", True, "<think>"),
        ("{{ tools }}<tool_call>\n<function=name>", "hermes", False, None),  # Qwen3-Coder's are no JSON
        ("{% if custom_tools %}{% set tools = custom_tools %}Environment: ipython", "llama3_json", True, None),
        ("{{ tools }}[AVAILABLE_TOOLS] [TOOL_CALLS] [", "mistral_list", True, None),
        ("{{ tools }}[TOOL_CALLS]name[ARGS] [THINK][/THINK]", "mistral", True, "[THINK]"),
        ("<｜tool▁calls▁begin｜> ```json </think>", "deepseek_v3", False, "<think>"),
        ("{{ tools }}<｜tool▁calls▁begin｜></think>", "deepseek_v31", True, "<think>"),
    ],
)
def test_the_dialect_is_seen_in_the_template(template, form, reads_tools, marks):
    dialect = dialect_of(template)
    assert (dialect.call_format.name, dialect.reads_tools) == (form, reads_tools)
    assert (dialect.marks and dialect.marks.begin) == marks


def test_the_operator_may_name_another_format():
    assert dialect_of(QWEN, "llama3_json").call_format is CALL_FORMATS["llama3_json"]
    assert not dialect_of(QWEN, "llama3_json").reads_tools, "the template would show other calls"
    assert dialect_of("{{ tools }}", "hermes").reads_tools


@pytest.mark.parametrize(
    ("fields", "names", "must_call", "may_repeat"),
    [
        ({}, {"add", "ping"}, False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, {"add", "ping"}, False, False),
        ({"tool_choice": "required"}, {"add", "ping"}, True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "ping"}}}, {"ping"}, True, False),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
                }
            },
            {"add"},
            True,
            True,
        ),
    ],
)
def test_tool_choice_says_what_may_and_must_be_called(fields, names, must_call, may_repeat):
    use = tool_use(request(tools=[ADD, PING], **fields))
    assert (use.names, use.must_call, use.may_repeat) == (names, must_call, may_repeat)


def test_no_tools_no_calls():
    nobody = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
    for fields in ({}, {"tools": [PING], "tool_choice": "none"}, {"tools": [PING], "tool_choice": nobody}):
        assert tool_use(request(**fields)) is None
    with pytest.raises(ApiError, match="send tools"):
        tool_use(request(tool_choice="required"))


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True, "a": 1}},
            {"enable_thinking": True, "a": 1},
        ),
    ],
)
def test_the_template_hears_how_much_to_think(fields, variables):
    assert template_kwargs(request(**fields)) == variables
