"""What clients say about the form of an answer becomes one grammar: response_format, structured_outputs, guided_*.

The first is OpenAI's, the other two are vLLM's, newer and older. A request has one grammar at most: whoever asks for
two forms is told so.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from engine.grammar import (
    WHITESPACE,
    GrammarError,
    Tag,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    tagged_grammar,
)
from engine.sampling_params import SamplingParams
from vcli.server.protocol import ApiError, GenerationRequest, decode_value, unsupported

ANY_OBJECT = {"type": "object"}


class JsonFormat(msgspec.Struct):
    """A schema with a name, as `response_format` and the responses API have it; without one, any object is right."""

    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any] | bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonFormat | None = None
    structures: list[Structure] | None = None  # of a structural_tag
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct):
    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


def with_form(params: SamplingParams, request: GenerationRequest) -> tuple[SamplingParams, str]:
    """Sampling parameters with the grammar that their request asks for, and the parameter that does ('': none)."""
    grammar, param = grammar_of(request)
    try:
        return (msgspec.structs.replace(params, grammar=grammar) if grammar else params), param
    except ValueError as error:  # other parameters do not go with it
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from None


def grammar_of(request: GenerationRequest) -> tuple[str, str]:
    """The grammar that a request asks for and the parameter that does, both '' if none does. Raises ApiError."""
    asked: dict[str, Callable[[], str]] = {}
    if request.response_format is not None:
        response_format = decode_value(request.response_format, ResponseFormat, "response_format")
        if response_format.type != "text":
            asked["response_format"] = lambda: _of_response_format(response_format)
    if request.structured_outputs:
        outputs = decode_value(request.structured_outputs, StructuredOutputs, "structured_outputs")
        asked |= {f"structured_outputs.{name}": make for name, make in _of_structured_outputs(outputs).items()}
    for name in _GUIDED:
        if (value := getattr(request, f"guided_{name}")) not in (None, "", []):
            outputs = decode_value({name: value}, StructuredOutputs, f"guided_{name}")
            asked |= {f"guided_{name}": make for make in _of_structured_outputs(outputs).values()}
    if not asked:
        return "", ""
    if len(asked) > 1:
        raise ApiError(400, f"an answer has one form: send {' or '.join(asked)}, not both", param=next(iter(asked)))
    [(param, make)] = asked.items()
    try:
        return make(), param
    except GrammarError as error:
        raise bad_grammar(error, param) from None


def json_format_grammar(json_format: JsonFormat | None, param: str) -> str:
    """The grammar of a named schema; with "strict": false, of what a grammar can keep of it. Raises ApiError."""
    schema = json_format.schema if json_format is not None else None
    is_lenient = json_format is not None and json_format.strict is False
    try:
        return json_grammar(ANY_OBJECT if schema is None else schema, is_lenient=is_lenient)
    except GrammarError as error:
        raise bad_grammar(error, param) from None


def bad_grammar(error: GrammarError, param: str | None) -> ApiError:
    return ApiError(400, f"{param}: {error}" if param else str(error), param=param, code="invalid_grammar")


_GUIDED = ("json", "regex", "choice", "grammar")

Decoded = TypeVar("Decoded")


def _of_response_format(response_format: ResponseFormat) -> str:
    match response_format.type:
        case "json_object":
            return json_grammar(ANY_OBJECT)
        case "json_schema":
            if response_format.json_schema is None:
                raise GrammarError('json_schema is missing: send {"name": ..., "schema": {...}}')
            return json_format_grammar(response_format.json_schema, "response_format.json_schema")
        case "structural_tag":
            return _of_structural_tag(response_format)
    raise unsupported("response_format", {"type": response_format.type})


def _of_structured_outputs(outputs: StructuredOutputs) -> dict[str, Callable[[], str]]:
    """How each form that is asked for becomes a grammar."""
    if outputs.disable_additional_properties:
        raise unsupported("structured_outputs.disable_additional_properties", True)
    whitespace = "" if outputs.disable_any_whitespace else outputs.whitespace_pattern or WHITESPACE
    makers: dict[str, tuple[Any, Callable[[Any], str]]] = {
        "json": (outputs.json, lambda schema: json_grammar(schema, whitespace=whitespace)),
        "regex": (outputs.regex, regex_grammar),
        "choice": (outputs.choice, choice_grammar),
        "grammar": (outputs.grammar, lark_grammar),
        "json_object": (outputs.json_object or None, lambda _: json_grammar(ANY_OBJECT, whitespace=whitespace)),
        "structural_tag": (outputs.structural_tag, _of_tag_text),
    }
    return {
        name: lambda make=make, value=value: make(value)  # type: ignore[misc]
        for name, (value, make) in makers.items()
        if value is not None
    }


def _of_tag_text(tag: dict[str, Any] | str) -> str:
    if isinstance(tag, str):
        try:
            tag = msgspec.json.decode(tag)
        except msgspec.DecodeError as error:
            raise GrammarError(f"the structural tag is not valid JSON: {error}") from None
    return _of_structural_tag(decode_value(tag, ResponseFormat, "structural_tag"))


def _of_structural_tag(tag: ResponseFormat) -> str:
    """vLLM's structural tag: text, in which a trigger begins one of the structures."""
    triggers = tag.triggers or []
    tags = []
    for structure in tag.structures or []:
        trigger = next((trigger for trigger in triggers if trigger and structure.begin.startswith(trigger)), None)
        if trigger is None:
            raise GrammarError(f"no trigger is the beginning of {structure.begin[:80]!r}")
        schema = ANY_OBJECT if structure.schema is None else structure.schema
        tags.append(Tag(structure.begin, schema, structure.end, trigger))
    return tagged_grammar(tags)
