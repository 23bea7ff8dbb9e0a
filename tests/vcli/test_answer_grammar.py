"""Answers that their grammar takes, and those that it does not, byte by byte."""

import json
import random
from typing import Any

import jsonschema
import llguidance
import numpy
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from vcli.server.answer_grammar import answer_grammar
from vcli.server.dialects import CALL_FORMATS, MARKS, CallFormat, Marks
from vcli.server.parts import AnswerForm, Arguments, CallBegun, Parser, Text
from vcli.server.protocol import Function, Tool
from vcli.server.tools import ToolUse, strict_schema_of

TOKENIZER = llguidance.LLTokenizer("byte")
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "day": {"$ref": "#/$defs/day"}},
    "required": ["city"],
    "$defs": {"day": {"enum": ["today", "tomorrow"]}},
}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    Tool(Function("get_weather", parameters=WEATHER)),
    Tool(Function("add", parameters=ADD)),
    Tool(Function("ping")),
]
CALL = ("get_weather", '{"city": "Z", "day": "today"}')
OTHER = ("add", '{"a": 5}')
NUMBER = json.dumps({"grammars": [{"json_schema": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}]})
DIALECTS = [
    pytest.param(call_format, marks, is_thinking, id=f"{call_format.name} {marks and marks.begin} {is_thinking}")
    for call_format in CALL_FORMATS.values()
    for marks, is_thinking in [(None, False), (MARKS[0], False), (MARKS[0], True), (MARKS[3], False)]
]


class Grammar:
    def __init__(self, form: AnswerForm, content: str = "", special_tokens: dict[str, int] | None = None) -> None:
        self.matcher = llguidance.LLMatcher(TOKENIZER, answer_grammar(form, content, special_tokens or {}))
        assert not self.matcher.is_error(), self.matcher.get_error()

    def takes(self, text: str) -> bool:
        """Is this a whole answer?"""
        matcher, tokens = self.matcher.deep_copy(), list(text.encode())
        return (
            matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
        )


def written(call_format: CallFormat, *calls: tuple[str, str]) -> str:
    text = call_format.write(list(calls))
    return text.removeprefix(call_format.begin) if call_format.is_bare else text


def thoughts(marks: Marks | None, is_thinking: bool) -> str:
    if marks is None:
        return ""
    return ("" if is_thinking else marks.begin) + "\nA <tool_call>? {\n" + marks.end + "\n\n"


def form(call_format: CallFormat, marks: Marks | None, is_thinking: bool, **use: Any) -> AnswerForm:
    return AnswerForm(marks=marks, is_thinking=is_thinking, tools=ToolUse(TOOLS, **use), call_format=call_format)


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_text_is_free_and_calls_are_valid(call_format, marks, is_thinking):
    grammar, before = Grammar(form(call_format, marks, is_thinking)), thoughts(marks, is_thinking)
    for answer in (
        "",
        "Hello.",
        written(call_format, CALL),
        written(call_format, CALL, OTHER),
        written(call_format, ("ping", "{}")),
    ):
        assert grammar.takes(before + answer), answer
        assert grammar.takes(answer) == (not is_thinking)
    for arguments in ('{"city": 5}', "{}", '{"city": "Z", "day": "never"}', '{"city": "Z", "more": 1}', "5"):
        assert not grammar.takes(before + written(call_format, ("get_weather", arguments))), arguments
    assert not grammar.takes(before + written(call_format, ("unknown", "{}")))
    assert not grammar.takes(before + written(call_format, CALL)[:-1])
    if not call_format.is_bare:
        assert grammar.takes(before + "Wait.\n" + written(call_format, CALL))


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_one_call_is_one(call_format, marks, is_thinking):
    before = thoughts(marks, is_thinking)
    for must_call in (False, True):
        grammar = Grammar(form(call_format, marks, is_thinking, must_call=must_call, may_repeat=False))
        assert grammar.takes(before + written(call_format, CALL))
        assert not grammar.takes(before + written(call_format, CALL, OTHER))


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_a_call_that_must_be_is(call_format, marks, is_thinking):
    for content in ("", NUMBER):
        grammar = Grammar(form(call_format, marks, is_thinking, must_call=True), content)
        before = thoughts(marks, is_thinking)
        assert grammar.takes(before + written(call_format, CALL))
        assert grammar.takes(before + written(call_format, CALL, OTHER))
        for answer in ("", "Hello.", "Well. " + written(call_format, CALL), '{"x": 1}'):
            assert not grammar.takes(before + answer)


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_an_answer_with_a_form_has_it_or_calls(call_format, marks, is_thinking):
    before = thoughts(marks, is_thinking)
    for content, valid, invalid in ((NUMBER, '{"x": 1}', '{"x": "1"}'), ('start: "yes" | "no"', "yes", "maybe")):
        grammar = Grammar(form(call_format, marks, is_thinking), content)
        assert grammar.takes(before + valid)
        assert grammar.takes(before + written(call_format, CALL, OTHER))
        assert not grammar.takes(before + invalid)


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.begin)
def test_thoughts_come_before_the_form_of_an_answer(marks):
    grammar = Grammar(AnswerForm(marks=marks, is_thinking=True), NUMBER)
    assert grammar.takes(f'hm {{ {marks.end}\n{{"x": 1}}')
    assert not grammar.takes('{"x": 1}')
    grammar = Grammar(AnswerForm(marks=marks), NUMBER)
    assert grammar.takes(f'{marks.begin}hm{marks.end}{{"x": 1}}')
    assert grammar.takes('{"x": 1}')
    assert answer_grammar(AnswerForm(marks=marks), "", {}) == "", "who thinks and is free needs none"


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_what_the_grammar_takes_the_parser_finds(call_format, marks, is_thinking):
    answer = form(call_format, marks, is_thinking)
    text = thoughts(marks, is_thinking) + written(call_format, CALL, OTHER)
    assert Grammar(answer).takes(text)
    parser = Parser(answer)
    parts = parser.add(text) + parser.finish()
    assert [part.name for part in parts if isinstance(part, CallBegun)] == ["get_weather", "add"]
    assert "".join(part.text for part in parts if isinstance(part, Arguments)) == CALL[1] + OTHER[1]


def test_marks_that_are_special_tokens_are_asked_for_as_tokens():
    """No text can spell them. Here byte 7 stands for one, which the tokenizer of bytes has anyway."""
    special_tokens = {"[TOOL_CALLS]": 7, "[ARGS]": 8, "[THINK]": 11, "[/THINK]": 12}
    answer = form(CALL_FORMATS["mistral"], MARKS[1], is_thinking=False)
    text = answer_grammar(answer, "", special_tokens)
    assert "<[7]>" in text
    assert "<[8]>" in text
    assert "[TOOL_CALLS]" not in text
    assert "[THINK]" not in text
    assert answer.has_marks_among(special_tokens)
    assert not form(CALL_FORMATS["hermes"], None, False).has_marks_among(special_tokens)
    Grammar(answer, "", special_tokens)


@pytest.mark.parametrize(("call_format", "marks", "is_thinking"), DIALECTS)
def test_whatever_the_grammar_lets_through_is_calls(call_format, marks, is_thinking):
    """Drawn byte by byte, as a model without any sense would."""
    answer = form(call_format, marks, is_thinking, must_call=True)
    grammar, num_calls = Grammar(answer), 0
    for seed in range(6):
        text = drawn(grammar.matcher.deep_copy(), random.Random(seed), start=thoughts(marks, is_thinking))
        parser = Parser(answer)
        parts = parser.add(text) + parser.finish()
        assert not [part for part in parts if isinstance(part, Text)], text
        calls = [part for part in parts if isinstance(part, CallBegun)]
        assert calls, text
        num_calls += len(calls)
        for call in calls:
            arguments = "".join(part.text for part in parts if isinstance(part, Arguments) and part.index == call.index)
            [tool] = [tool for tool in TOOLS if tool.function.name == call.name]
            jsonschema.validate(json.loads(arguments), strict_schema_of(tool))
    assert num_calls > 6, "some of them several at once"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},  # pydantic's set[str]
        {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "string"},
        },  # zod's record
        {"type": "array", "items": {"type": "string", "pattern": r"^(?!x)\w+\b"}},
        {"oneOf": [{"type": "array"}, {"type": "array", "minItems": 1}]},
        {"type": "array", "not": {"type": "string"}},
    ],
)
def test_what_no_grammar_can_keep_is_left_out_unless_the_tool_is_strict(schema):
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = {strict: Tool(Function("f", parameters=parameters, strict=strict)) for strict in (None, True)}
    grammar = Grammar(AnswerForm(tools=ToolUse([tools[None]]), call_format=CALL_FORMATS["hermes"]))
    value = {} if schema.get("type") == "object" else ["v"]
    assert grammar.takes(CALL_FORMATS["hermes"].write([("f", json.dumps({"a": value}))]))
    assert not grammar.takes(CALL_FORMATS["hermes"].write([("f", '{"a": 5}')])), "the rest is kept"
    strict = answer_grammar(AnswerForm(tools=ToolUse([tools[True]]), call_format=CALL_FORMATS["hermes"]), "", {})
    assert llguidance.LLMatcher(TOKENIZER, strict, log_level=0).is_error()


def drawn(matcher: llguidance.LLMatcher, chooser: random.Random, start: str, most: int = 3000) -> str:
    """A random text, which ends at one of the places where it may."""
    tokens = list(start.encode())
    assert matcher.consume_tokens(tokens)
    mask = allocate_token_bitmask(1, TOKENIZER.vocab_size)
    while not matcher.is_accepting() or chooser.random() < 0.7:
        assert len(tokens) < most, bytes(tokens)
        fill_next_token_bitmask(matcher, mask)
        allowed = numpy.flatnonzero(numpy.unpackbits(mask[0].view(numpy.uint8), bitorder="little"))
        allowed = allowed[allowed != TOKENIZER.eos_token]
        if not len(allowed):
            break
        # Now and then the end of a string: there are many other bytes.
        token = ord('"') if ord('"') in allowed and chooser.random() < 0.3 else int(chooser.choice(allowed))
        matcher.consume_token(token)
        tokens.append(token)
    return bytes(tokens).decode()
