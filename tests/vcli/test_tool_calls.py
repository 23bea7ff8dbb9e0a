"""Calls of a model with random weights: only the grammar can make them valid. Their marks are special tokens."""

import json
import shutil

import jsonschema
import openai
import pytest

TEMPLATE = "{#- {{ tools }} [TOOL_CALLS] [ARGS] -#}{{ messages[-1].content }}"
PLAN = {
    "name": "plan",
    "parameters": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["sum", "product"]},
            "numbers": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
            "note": {"type": "string", "maxLength": 8},
            "options": {"type": "object", "properties": {"fast": {"type": "boolean"}}, "additionalProperties": False},
        },
        "required": ["kind", "numbers"],
        "additionalProperties": False,
    },
}
PING = {"name": "ping"}
TOOLS = [{"type": "function", "function": function} for function in (PLAN, PING)]
ASKED = {
    "model": "",
    "messages": [{"role": "user", "content": "What now?"}],
    "tools": TOOLS,
    "parallel_tool_calls": False,
    "temperature": 1,
    "max_tokens": 400,
}


@pytest.fixture(scope="module")
def client(start_server, tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral") / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    make_special(folder / "tokenizer.json", ["[TOOL_CALLS]", "[ARGS]"])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return start_server("--kv-cache-memory", "64MiB", model=folder).wait_ready().client


def make_special(file, names) -> None:
    """Give the youngest tokens other names, which no text has."""
    tokenizer = json.loads(file.read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for name in names:
        youngest = max(vocab, key=lambda token: vocab[token] if token not in names else -1)
        vocab[name] = vocab.pop(youngest)
        merges[:] = [merge for merge in merges if "".join(merge) != youngest]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": vocab[name], "content": name, "special": True, **flags})
    file.write_text(json.dumps(tokenizer))


def check(call) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "plan":
        jsonschema.validate(arguments, PLAN["parameters"])
    else:
        assert (call.function.name, arguments) == ("ping", {})


def test_whoever_must_call_calls_once_and_right(client):
    choices = client.chat.completions.create(**ASKED, tool_choice="required", n=16).choices
    assert [choice.finish_reason for choice in choices] == ["tool_calls"] * 16
    for choice in choices:
        assert choice.message.content is None
        [call] = choice.message.tool_calls
        check(call)
    assert {choice.message.tool_calls[0].function.name for choice in choices} == {"plan", "ping"}


def test_a_response_calls_and_goes_on_from_what_it_hears(client):
    tools = [{"type": "function", **function} for function in (PLAN, PING)]
    asked = {"model": "", "tools": tools, "tool_choice": {"type": "function", "name": "plan"}, "max_output_tokens": 400}
    with client.responses.stream(input="What now?", **asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    [call] = first.output
    assert (call.type, call.name, call.arguments, first.status) == (
        "function_call",
        "plan",
        "".join(pieces),
        "completed",
    )
    jsonschema.validate(json.loads(call.arguments), PLAN["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    second = client.responses.create(input=[result], previous_response_id=first.id, **asked | {"tool_choice": "none"})
    assert [item.type for item in second.output] == ["message"]
    by_item = client.responses.create(
        input=[{"role": "user", "content": "What now?"}, call, result], **asked | {"tool_choice": "none"}
    )
    assert by_item.usage.input_tokens == second.usage.input_tokens


def test_whoever_must_call_one_tool_calls_that(client):
    named = {"type": "function", "function": {"name": "plan"}}
    names, arguments, ends = [""] * 8, [""] * 8, [""] * 8
    for event in client.chat.completions.create(**ASKED, tool_choice=named, n=8, stream=True):
        [choice] = event.choices
        for call in choice.delta.tool_calls or []:
            names[choice.index] += call.function.name or ""
            arguments[choice.index] += call.function.arguments
        ends[choice.index] += choice.finish_reason or ""
    assert (names, ends) == (["plan"] * 8, ["tool_calls"] * 8)
    for text in arguments:
        jsonschema.validate(json.loads(text), PLAN["parameters"])


@pytest.mark.parametrize(
    ("schema", "strict", "choice"),
    [
        ({"type": "real"}, None, "auto"),
        ({"type": "real"}, None, {"type": "function", "function": {"name": "bad"}}),
        ({"type": "array", "uniqueItems": True}, True, "auto"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_place(client, schema, strict, choice):
    bad = {
        "type": "function",
        "function": {"name": "bad", "parameters": {"properties": {"a": schema}}, "strict": strict},
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED | {"tools": [*TOOLS, bad]}, tool_choice=choice)
    assert caught.value.param == "tools[2].function.parameters"
    assert "properties.a" in str(caught.value)
