"""What models write, cut anywhere, comes out as the same parts."""

import itertools
import random
from typing import Any

import pytest

from vcli.server.dialects import CALL_FORMATS, MARKS, CallFormat
from vcli.server.parts import AnswerForm, Arguments, CallBegun, Markup, Parser, Part, Reasoning, Text
from vcli.server.protocol import Function, Tool
from vcli.server.tools import ToolUse

TOOLS = ToolUse([Tool(Function("get_weather")), Tool(Function("add"))])
WEATHER = '{"city": "Zürich \\"{[\\\\", "days": [1, {"a": 2}], "deep": {"x": null, "y": -1.5e3}}'
ADD = '{"a": 1, "b": 2}'


def parser(form: str | None = None, **arguments: Any) -> Parser:
    ids = map(str, itertools.count())
    call_format = CALL_FORMATS[form] if form else None
    answer_form = AnswerForm(call_format=call_format, tools=TOOLS, **arguments)
    return Parser(answer_form, lambda: next(ids))


def parts_of(parser: Parser, pieces: list[str]) -> list[Part]:
    return joined([part for piece in pieces for part in parser.add(piece)] + parser.finish())


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    result: list[Part] = []
    for part in parts:
        before = result[-1] if result else None
        if isinstance(part, Arguments) and isinstance(before, Arguments) and before.index == part.index:
            result[-1] = Arguments(part.index, before.text + part.text)
        elif isinstance(part, Text | Reasoning | Markup) and type(before) is type(part):
            result[-1] = type(part)(before.text + part.text)  # type: ignore[union-attr]
        else:
            result.append(part)
    return result


def shown(parts: list[Part]) -> list[Part]:
    return joined([part for part in parts if not isinstance(part, Markup)])


def raw(parts: list[Part]) -> str:
    return "".join("" if isinstance(part, CallBegun) else part.text for part in parts)


def cuts(text: str, seed: int) -> list[str]:
    places = sorted(random.Random(seed).choices(range(len(text) + 1), k=random.Random(seed).randint(0, 12)))
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


# As the models' own documentation and templates show them, two calls each.
DOCUMENTED = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
    f'<tool_call>\n{{"arguments": {ADD}, "name": "add"}}\n</tool_call>',
    "llama3_json": f'{{"type": "function", "name": "get_weather", "parameters": {WEATHER}}}; '
    f'{{"name": "add", "parameters": {ADD}}}',
    "mistral_list": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}, "id": "ABCDEFG01"}}, '
    f'{{"name": "add", "arguments": {ADD}}}]',
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]add[ARGS]{ADD}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    f"```json\n{WEATHER}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
    f"```json\n{ADD}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>"
    f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}
CALLS = [CallBegun(0, "0", "get_weather"), Arguments(0, WEATHER), CallBegun(1, "1", "add"), Arguments(1, ADD)]


@pytest.mark.parametrize("form", DOCUMENTED)
def test_documented_calls_are_taken_apart_however_they_are_cut(form: str):
    text = DOCUMENTED[form]
    assert shown(parts_of(parser(form), [text])) == CALLS
    whole = parts_of(parser(form), [text])
    assert parts_of(parser(form), list(text)) == whole
    for seed in range(50):
        assert parts_of(parser(form), cuts(text, seed)) == whole


@pytest.mark.parametrize("form", CALL_FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.begin)
def test_thoughts_answer_and_calls_come_one_after_the_other(form: CallFormat, marks):
    calls = form.write([("get_weather", WEATHER), ("add", ADD)])
    text = f"{marks.begin}\nIs it {{cold}}?\n\n{marks.end}\n\nI look.\n{calls}"
    expected = [Reasoning("Is it {cold}?"), Text("I look."), *CALLS]
    for seed in range(20):
        assert shown(parts_of(parser(form.name, marks=marks), cuts(text, seed))) == expected


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.begin)
def test_thoughts_that_the_prompt_has_opened_are_thoughts_from_the_start(marks):
    expected = [Reasoning("So be it."), Text("Yes.")]
    text = f"So be it.\n{marks.end}\n\nYes."
    assert shown(parts_of(parser(marks=marks, is_thinking=True), list(text))) == expected
    assert shown(parts_of(parser(marks=marks, is_thinking=True), list(marks.begin + text))) == expected
    assert parts_of(parser(marks=marks), list(text)) == [Text(text)], "nobody has opened them"


def test_arguments_stream_as_they_come():
    parsed = parser("hermes")
    assert parsed.add('Well.\n<tool_call>\n{"name": "get_weather", "argum') == [Text("Well."), *parsed.add("")]
    assert [type(part) for part in parsed.add('ents": {"city": "Z')] == [CallBegun, Markup, Arguments]
    assert parsed.add("ür") == [Arguments(0, "ür")]
    assert parsed.add("ich\\") == [Arguments(0, "ich")], "half of an escape waits"
    assert parsed.add('n"}}') == [Arguments(0, '\\n"}'), Markup("}")]
    assert parsed.num_calls == 1


@pytest.mark.parametrize("form", CALL_FORMATS.values(), ids=lambda form: form.name)
def test_what_is_no_call_is_text(form: CallFormat):
    for text in (
        f"a {form.begin} b {form.begin[:-1]} c",
        f"a {form.begin[:-1]}",
        f"{form.begin}{form.first}{form.head('unknown')}{{}}{form.tail}{form.close}",
        f"{form.begin}{form.first}nonsense, all of it",
        '{"name": "Ada", "arguments": "none"}',
        '{"name": 5}',
        "  {not json",
        "plain \n\n",
    ):
        assert "".join(part.text for part in parts_of(parser(form.name), list(text)) if isinstance(part, Text)) == text


@pytest.mark.parametrize("form", CALL_FORMATS.values(), ids=lambda form: form.name)
def test_a_call_that_is_cut_off_keeps_what_came(form: CallFormat):
    text = "I look. " + form.write([("get_weather", WEATHER)])
    for length in range(len(text)):
        parts = parts_of(parser(form.name), [text[:length]])
        arguments = "".join(part.text for part in parts if isinstance(part, Arguments))
        assert WEATHER.startswith(arguments)
        assert raw(parts) == text[:length]
        if length >= len("I look. " + form.begin):
            assert shown(parts)[0] == Text("I look."), "no marks in it"


@pytest.mark.parametrize("form", [None, *CALL_FORMATS])
def test_no_character_is_lost_or_doubled_whatever_a_model_writes(form: str | None):
    call_format = CALL_FORMATS[form] if form else CALL_FORMATS["hermes"]
    words = [
        *(call_format.begin, call_format.first, call_format.name_end, call_format.end, call_format.more),
        *(call_format.close, call_format.write([("add", ADD)]), call_format.head("get_weather"), "<think>", "</think>"),
        *(
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            ":",
            ",",
            " ",
            "\n",
            "text",
            "é",
            "name",
            '"name"',
            '"arguments"',
            "get_weather",
        ),
        *('{"name": "add", ', '"arguments": {"a": ["}"]}', "null", "1.5", "<", "<tool", "</"),
    ]
    for seed in range(500):
        chosen = random.Random(seed)
        text = "".join(chosen.choices(words, k=chosen.randint(1, 14)))
        options = {"marks": MARKS[0] if chosen.random() < 0.5 else None, "is_thinking": chosen.random() < 0.2}
        whole = parts_of(parser(form, **options), [text])
        assert raw(whole) == text
        assert parts_of(parser(form, **options), list(text)) == whole, text
        assert parts_of(parser(form, **options), cuts(text, seed)) == whole, text
