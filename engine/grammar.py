"""Grammars as text: what an answer must look like, in llguidance's language (Lark, with `%json` and lazy rules).

A grammar is made here from a JSON schema, a regular expression, a list of choices, or from tags between which there is
text of any kind, and travels in `SamplingParams.grammar`. The engine compiles it (grammar_compiler.py) and keeps every
token to it (token_mask.py). Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64  # brackets inside brackets: the libraries that read grammars go down by recursion
MAX_CHARS = 128 * 1024

# Between two tokens of JSON: a space, or a new line and its indentation. Without a bound a model may fill its answer
# with nothing else.
WHITESPACE = r" |\n[ ]{0,24}"

MAX_INTEGER = 2**53 - 1
LONGEST_TIME = len("2026-11-23T21:50:37.123456789+00:00")

Schema = dict[str, Any] | bool


class GrammarError(ValueError):
    """A grammar that cannot be used. The message says what is wrong with it and where."""


@dataclass(frozen=True)
class Tag:
    """A place in a text where a JSON value of a schema stands between two fixed strings.

    trigger: the beginning of `begin` that text must not contain otherwise; all of `begin`, if it is empty.
    """

    begin: str
    schema: Schema
    end: str
    trigger: str = ""


def json_grammar(schema: Schema | str, *, whitespace: str = WHITESPACE, is_lenient: bool = False) -> str:
    """A JSON value that is valid by the schema, given as data or as text. Raises GrammarError if it is no schema.

    whitespace: a regular expression of what may stand between two tokens; nothing, if it is empty.
    is_lenient: what a grammar cannot keep (uniqueItems, propertyNames, not, if, patterns that look around) is left out.
    """
    return json.dumps({"grammars": [{"json_schema": _with_options(read_schema(schema), whitespace, is_lenient)}]})


def embedded_json(schema: Schema | str, *, is_lenient: bool = False) -> str:
    """The same as a word of Lark."""
    return "%json " + json.dumps(_with_options(read_schema(schema), WHITESPACE, is_lenient))


def regex_grammar(regex: str) -> str:
    """A text that the whole of a regular expression matches: Rust's syntax, without look-around; \\d is 0 to 9."""
    from llguidance import regex_to_lark

    check_size(regex)
    return f"start: /{regex_to_lark(regex, 'd')}/"


def choice_grammar(choices: Sequence[str]) -> str:
    """One of several texts. Raises GrammarError if there is none, or an empty one."""
    if not choices or not all(choices):
        raise GrammarError("choice must hold at least one string, and no empty one")
    return "start: " + " | ".join(literal(choice) for choice in choices)


def lark_grammar(text: str) -> str:
    """A grammar in Lark's syntax, or in llama.cpp's GBNF, which has `root ::=`. Raises GrammarError."""
    if "::=" not in text:
        return text
    check_size(text)
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # the library raises plain Exception
        raise GrammarError(f"the grammar is not readable as GBNF: {error}") from None


def tagged_grammar(tags: Sequence[Tag], *, at_least: int = 0, at_most: int | None = None) -> str:
    """Text with tags in it, at_least to at_most of them; where there must be one, nothing but tags and white space.

    From a trigger on, a tag must follow. Text that only begins like a trigger is text.
    """
    triggers = list(dict.fromkeys(tag.trigger or tag.begin for tag in tags))
    if not triggers or not all(triggers):
        raise GrammarError("a tag needs a text that it begins with")
    if any(not tag.begin.startswith(tag.trigger) for tag in tags):
        raise GrammarError("a tag must begin with its trigger")
    most = "" if at_most is None else at_most
    # Text behind the last tag allowed could hold another one, so there is none.
    text_and_tags = "tag* TEXT" if at_most is None else f"TEXT | tag{{1,{most}}}"
    start = f"tag{{{at_least},{most}}}" if at_least else text_and_tags
    lines = ["%llguidance {}", "start: " + start]
    lines.append("tag: " + " | ".join(f"tag_{index}" for index in range(len(triggers))))
    for index, trigger in enumerate(triggers):
        text = "SPACE? " if at_least else "TEXT "
        lines.append(f"tag_{index}: head_{index} (" + " | ".join(_tails(tags, trigger)) + ")")
        lines.append(f"head_{index}" + (": " if at_least else "[lazy]: ") + text + literal(trigger))
    return "\n".join([*lines, r"TEXT: /(.|\n)*/", r"SPACE: /[ \n]{1,4}/"])


def read_schema(schema: Schema | str) -> Schema:
    """A JSON schema as data. Raises GrammarError for text that is no JSON, and for what is nested too deeply."""
    check_size(schema if isinstance(schema, str) else json.dumps(schema))
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise GrammarError(f"the JSON schema is not valid JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"a JSON schema is an object, got {json.dumps(schema)[:40]}")
    return schema


def check_size(text: str) -> None:
    """Raises GrammarError for a grammar that is too long, or nested too deeply."""
    if len(text) > MAX_CHARS:
        raise GrammarError(f"the grammar has {len(text):,} characters: at most {MAX_CHARS:,} are possible")
    depth = 0
    for bracket in re.finditer(r"\\.|[()\[\]{}]", text, re.DOTALL):
        depth = max(depth + _STEPS.get(bracket[0], 0), 0)
        if depth > MAX_DEPTH:
            raise GrammarError(f"the grammar is nested more than {MAX_DEPTH} deep, at character {bracket.start():,}")


_STEPS = dict.fromkeys("([{", 1) | dict.fromkeys(")]}", -1)


def subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, with their places in it, like `.properties.name`."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            yield from ((f".{key}.{name}", inner) for name, inner in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from ((f".{key}[{i}]", inner) for i, inner in enumerate(value))
        elif key in _SINGLES:
            yield f".{key}", value


_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS = {"anyOf", "allOf", "oneOf", "prefixItems", "items"}
_SINGLES = {"items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains"}


def _without_looking_around(schema: Any) -> Any:
    """The schema without patterns of a kind that no automaton can match."""
    if isinstance(schema, list):
        return [_without_looking_around(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_looking_around(value)
        for key, value in schema.items()
        if not (key == "pattern" and isinstance(value, str) and _LOOKS_AROUND.search(value))
    }


_LOOKS_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9bB]")  # back-references and edges of words, too


def _bounded(schema: Any) -> Any:
    """The schema with an end to what has none in JSON: a model that likes digits may go on with them for ever.

    Integers stay within what all programs read (RFC 7493), times have nanoseconds at most, and numbers between two
    bounds as many decimals.
    """
    if not isinstance(schema, dict):
        return schema
    bounded = dict(schema)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            bounded[key] = {name: _bounded(inner) for name, inner in value.items()}
        elif key in _LISTS and isinstance(value, list):
            bounded[key] = [_bounded(inner) for inner in value]
        elif key in _SINGLES:
            bounded[key] = _bounded(value)
    kind = schema.get("type")
    if kind == "integer" or (isinstance(kind, list) and "integer" in kind and "number" not in kind):
        for least, name in ((-1, "minimum"), (1, "maximum")):
            if name not in schema and f"exclusive{name.capitalize()}" not in schema:
                bounded[name] = least * MAX_INTEGER
    if kind == "number" and "multipleOf" not in schema and _width(schema) > 1e-6:
        bounded["multipleOf"] = 1e-9
    if schema.get("format") in ("time", "date-time"):
        bounded.setdefault("maxLength", LONGEST_TIME)
    return bounded


def _width(schema: dict[str, Any]) -> float:
    """How far the bounds of a number are apart; 0 if one is missing."""
    low, high = (schema.get(name, schema.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return 0.0
    try:
        return float(high) - float(low)
    except OverflowError:  # an integer of 400 digits
        return 0.0


def _with_options(schema: Schema, whitespace: str, is_lenient: bool) -> Schema:
    options: dict[str, Any] = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    if is_lenient:
        schema = _without_looking_around(schema)
        options |= {"lenient": True, "coerce_one_of": True}
    if schema is False:
        raise GrammarError("the JSON schema is false: no value is valid")
    plain: dict[str, Any] = _bounded(schema) if isinstance(schema, dict) else {}
    return plain | {"x-guidance": options}


def _tails(tags: Sequence[Tag], trigger: str) -> Iterator[str]:
    for tag in tags:
        if (tag.trigger or tag.begin) == trigger:
            parts = [literal(tag.begin[len(trigger) :]), embedded_json(tag.schema), literal(tag.end)]
            yield " ".join(part for part in parts if part)


def literal(text: str) -> str:
    """A fixed text as a word of Lark; nothing if it is empty."""
    return json.dumps(text, ensure_ascii=False) if text else ""
