"""What an answer with thoughts and tool calls must look like, as a grammar that the engine keeps it to.

Thoughts are free until their end, and text is until a call begins. A call has a name that exists and arguments that are
valid by its schema, between the marks of the model's dialect. Marks that are special tokens of the tokenizer are asked
for as these tokens: no text can spell them. Source of the language:
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache

import msgspec

from engine.grammar import MAX_CHARS, GrammarError, embedded_json, json_grammar, literal
from engine.sampling_params import SamplingParams
from vcli.server.dialects import CallFormat, Marks
from vcli.server.parts import AnswerForm
from vcli.server.protocol import ApiError, Tool
from vcli.server.structured import bad_grammar
from vcli.server.tools import ToolUse, strict_schema_of

Check = Callable[[str, str], Awaitable[None]]  # of a grammar, and the parameter that it is made of; raises ApiError


async def shaped_answer(
    params: SamplingParams, form: AnswerForm, special_tokens: Mapping[str, int], check: Check
) -> SamplingParams:
    """Sampling parameters of an answer of this form. Raises ApiError."""
    shows_tokens = form.has_marks_among(special_tokens)
    tools = form.tools.callable_tools() if form.tools else []
    alone = {f"tools[{index}].function.parameters": tool for index, tool in tools}
    for param, tool in alone.items():
        try:
            _arguments(tool)
        except (GrammarError, RecursionError) as error:
            raise bad_grammar(GrammarError(str(error)), param) from None
    grammar = answer_grammar(form, params.grammar, special_tokens)
    try:
        await check(grammar, "tools" if tools else "response_format")
    except ApiError:
        if len(grammar) <= MAX_CHARS:  # else they are too many
            for param, tool in alone.items():
                await check(json_grammar(strict_schema_of(tool), is_lenient=not tool.function.strict), param)
        raise
    try:
        skips = params.skip_special_tokens and not shows_tokens
        return msgspec.structs.replace(params, grammar=grammar, skip_special_tokens=skips)
    except ValueError as error:  # other parameters do not go with a grammar
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from None


def answer_grammar(form: AnswerForm, content: str, special_tokens: Mapping[str, int]) -> str:
    """The grammar of a whole answer; empty if anything may come. Raises GrammarError for a schema that is none.

    content: a grammar of the answer's text, or "". special_tokens: the tokenizer's, their ids by their texts.
    """
    if form.tools and form.tools.must_call:
        content = ""  # which a call has none of
    if form.tools is None and not (content and form.marks):
        return content
    lark = _Grammar(special_tokens, has_content=bool(content)).write(form)
    if not content:
        return lark
    is_list = content.startswith("{")
    [first, *others] = json.loads(content)["grammars"] if is_list else [{"lark_grammar": content}]
    return json.dumps({"grammars": [{"lark_grammar": lark}, first | {"name": "content"}, *others]})


def _arguments(tool: Tool) -> str:
    """The arguments of a tool's call, as a word of Lark. Raises GrammarError."""
    return _embedded(msgspec.json.encode(strict_schema_of(tool)), is_lenient=not tool.function.strict)


@lru_cache(maxsize=256)
def _embedded(schema: bytes, *, is_lenient: bool) -> str:
    """Agents send the same tools with every turn."""
    return embedded_json(schema.decode(), is_lenient=is_lenient)


class _Grammar:
    """Writes one. TEXT is free text, FIRST such as an answer without thoughts may begin with."""

    def __init__(self, special_tokens: Mapping[str, int], *, has_content: bool) -> None:
        self._special = special_tokens
        self._special_pattern = re.compile("|".join(map(re.escape, special_tokens)) or "(?!)")
        self._has_content = has_content
        self._lines = [r"TEXT: /(.|\n)*/", r"SPACE: /\s{1,4}/"]

    def write(self, form: AnswerForm) -> str:
        if form.tools and form.call_format:
            self._chain(form.call_format, form.tools)
        if form.marks is None:
            start = self._answer(form, "TEXT")
        elif form.is_thinking:
            self._up_to("thoughts", form.marks.end, "TEXT")
            start = f"thoughts ({self._answer(form, 'TEXT')})"
        else:
            self._thoughts(form.marks)
            start = f"thoughts ({self._answer(form, 'TEXT')}) | {self._answer(form, 'FIRST')}"
        return "\n".join(["%llguidance {}", "start: " + start, *dict.fromkeys(self._lines)])

    def _thoughts(self, marks: Marks) -> None:
        """Thoughts that the model may begin by itself; text that begins like them is no answer."""
        if marks.begin in self._special:
            self._up_to("thoughts_end", marks.end, "TEXT")
            self._lines += [f"thoughts: SPACE? {self._words(marks.begin)} thoughts_end", "FIRST: TEXT"]
        else:
            self._lines += [rf"THOUGHTS: /\s*/ {literal(marks.begin)} TEXT", "FIRST: TEXT & ~THOUGHTS"]
            self._up_to("thoughts", marks.end, "THOUGHTS")

    def _answer(self, form: AnswerForm, text: str) -> str:
        """What follows the thoughts. text: the kind of text that it may begin with."""
        use, calls = form.tools, form.call_format
        if use is None or calls is None:
            return "SPACE? @content"
        marked = f"SPACE? {self._words(calls.begin)} chain"
        is_repeated = calls.repeats and use.may_repeat
        if use.must_call or self._has_content:
            chains = "SPACE? chain" if calls.is_bare else f"{marked} ({marked})*" if is_repeated else marked
            return chains if use.must_call else f"{chains} | SPACE? @content"
        if calls.is_bare:
            self._lines.append(rf"{text}_PLAIN: {text} & /\s*([^\s{{](.|\n)*)?/")
            alternatives = [f"{text}_PLAIN", "SPACE? chain", *([marked] if calls.begin in self._special else [])]
            return " | ".join(alternatives)
        self._up_to(f"{text.lower()}_head", calls.begin, text)
        if not is_repeated:
            return f"{text} | {text.lower()}_head chain"
        self._up_to("text_head", calls.begin, "TEXT")
        return f"{text} | {text.lower()}_head chain (text_head chain)* TEXT"

    def _chain(self, calls: CallFormat, use: ToolUse) -> None:
        """Rules for what follows the mark that begins calls."""
        tools = {f"call_{index}": tool for index, tool in use.callable_tools()}
        for name, tool in tools.items():
            head, tail = self._words(calls.head(tool.function.name)), self._words(calls.tail)
            if calls.is_bare:  # on its own: the lexer could not leave the rest of a longer word for the content's JSON
                head = head.replace('"{', '"{" "', 1)
            self._lines.append(" ".join([f"{name}:", head, _arguments(tool), tail]))
        more = f"({self._words(calls.more)} call)*" if use.may_repeat and calls.more else ""
        words = self._words(calls.first), "call", more, self._words(calls.close)
        self._lines += ["call: " + " | ".join(tools), "chain: " + " ".join(filter(None, words))]

    def _up_to(self, name: str, mark: str, text: str) -> None:
        """A rule for free text and the first such mark."""
        if mark in self._special:
            self._lines.append(f"{name}: {text} {self._words(mark)}")
        else:
            self._lines.append(f"{name}[lazy]: {text} {literal(mark)}")

    def _words(self, text: str) -> str:
        """A fixed text; the special tokens in it as such."""
        position, words = 0, []
        for match in self._special_pattern.finditer(text):
            words += [literal(text[position : match.start()]), f"<[{self._special[match[0]]}]>"]
            position = match.end()
        return " ".join(filter(None, [*words, literal(text[position:])]))
