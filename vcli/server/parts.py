"""What a model writes, taken apart while it comes: answer, thoughts and tool calls.

The parser is a recursive descent in which every function may pause for more text (`yield`). Up to `_position` the text
at hand is looked at, but not given yet: as soon as it is certain what that is, it goes out as that part; what turns out
to be no call after all is text. What always holds: every character is in exactly one part, and however the text is cut,
the parts are the same.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from vcli.server.dialects import CallFormat, Marks
from vcli.server.tools import ToolUse


@dataclass(slots=True)
class Text:
    """Of the answer."""

    text: str


@dataclass(slots=True)
class Reasoning:
    """Of the thoughts before it."""

    text: str


@dataclass(slots=True)
class CallBegun:
    """A tool is called; the arguments follow."""

    index: int  # among the calls of the answer
    id: str
    name: str


@dataclass(slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(slots=True)
class Markup:
    """What a model writes around the rest, for nobody to see."""

    text: str


Part = Text | Reasoning | CallBegun | Arguments | Markup
Pause = Generator[None, None, None]


@dataclass(frozen=True)
class AnswerForm:
    """What the answer to a prompt may be made of, beside text."""

    marks: Marks | None = None  # of thoughts, if the model may think
    is_thinking: bool = False  # the prompt has opened them already
    shows_reasoning: bool = True
    tools: ToolUse | None = None
    call_format: CallFormat | None = None  # in which it calls them

    def has_marks_among(self, tokens: Iterable[str]) -> bool:
        """Are any of these tokens among the marks, so that the text must show them?"""
        written = self.call_format.write([("", "")] * 2) if self.call_format else ""
        written += self.marks.begin + self.marks.end if self.marks else ""
        return any(token in written for token in tokens)


class Parser:
    """Of one answer."""

    def __init__(self, form: AnswerForm, new_id: Callable[[], str] | None = None) -> None:
        self.num_calls = 0
        self.form = form
        self._format = form.call_format
        self._tool_names = form.tools.names if form.tools else frozenset()
        self._new_id = new_id or (lambda: call_id(form.call_format.id_length if form.call_format else 0))
        self._text = ""  # not given yet
        self._position = 0  # looked at so far
        self._parts: list[Part] = []
        self._rest: Callable[[str], Part] = Text  # what the text at hand is if nothing more comes
        self._run = self._answer()
        self._advance()

    def add(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""
        self._text += text
        self._advance()
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """What was held back, at the end of the answer."""
        self._run.close()
        self._give(self._rest, len(self._text))
        parts, self._parts = self._parts, []
        return parts

    def _advance(self) -> None:
        next(self._run)

    # What an answer is made of.

    def _answer(self) -> Pause:
        if self.form.marks is not None:
            yield from self._thoughts(self.form.marks)
        if self._format is not None and self._format.is_bare and (yield from self._sees("{")):
            yield from self._calls(self._format, cut_off=Text)  # which may be JSON of another kind
        begins = [self._format.begin] if self._format is not None else []
        while True:
            yield from self._until(begins, Text, rest=Markup if self.form.tools and self.form.tools.must_call else Text)
            assert self._format is not None
            yield from self._calls(self._format, cut_off=Markup)

    def _thoughts(self, marks: Marks) -> Pause:
        if not (yield from self._takes(marks.begin)) and not self.form.is_thinking:
            return
        yield from self._separator(Reasoning)
        yield from self._until([marks.end], Reasoning, rest=Reasoning)
        yield from self._separator(Text)

    def _calls(self, form: CallFormat, cut_off: Callable[[str], Part]) -> Pause:
        """One call or more, from behind their beginning. What is none is text. cut_off: the beginning of a call."""
        self._rest = cut_off
        is_call = not form.first.strip() or (yield from self._takes(form.first.strip()))
        while is_call and (yield from (self._named_call(form) if form.name_end else self._object_call(form))):
            self._give(Markup)
            if form.end:
                yield from self._takes(form.end.strip())
            if not form.more or not (yield from self._takes(form.more.strip())):
                if form.close:
                    yield from self._takes(form.close)
                yield from self._separator(Text)
                return
        self._give(Text)

    def _named_call(self, form: CallFormat) -> Generator[None, None, bool]:
        yield from self._space()
        start = self._position
        yield from self._run_of(_NAME)
        name = self._text[start : self._position]
        if name not in self._tool_names or not (yield from self._takes(form.name_end.strip())):
            return False
        yield from self._space()
        self._begin_call(name)
        yield from self._arguments()
        return True

    def _object_call(self, form: CallFormat) -> Generator[None, None, bool]:
        """A call whose name stands in a JSON object with its arguments, in any order, and perhaps with more."""
        if not (yield from self._takes("{")):
            return False
        name, arguments, is_begun = "", (0, 0), False
        while not (yield from self._takes("}")):
            key = yield from self._string()
            if key is None or not (yield from self._takes(":")):
                return is_begun
            yield from self._space()
            start = self._position
            if key == "name" and not is_begun:
                name = (yield from self._string()) or ""
                if name not in self._tool_names:
                    return False
            elif key in (form.arguments_key, "arguments") and name and not is_begun:
                is_begun = True
                self._begin_call(name)
                yield from self._arguments()
            else:
                yield from self._value()
                if key in (form.arguments_key, "arguments"):
                    arguments = (start, self._position)
            if name and arguments[1] and not is_begun:
                is_begun = True
                self._begin_call(name, *arguments)
            yield from self._takes(",")
        return is_begun

    def _begin_call(self, name: str, start: int = 0, end: int = 0) -> None:
        """All at hand is a call of this tool; start, end: its arguments in it, if they were there before its name."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        self._parts.append(CallBegun(index, self._new_id(), name))
        self._rest = Markup
        if end:
            behind = self._position - end
            self._give(Markup, start)
            self._give(lambda text: Arguments(index, text), end - start)
            self._position = behind
        self._give(Markup)

    def _arguments(self) -> Pause:
        """The value at hand, given as it comes."""
        index = self.num_calls - 1
        self._rest = lambda text: Arguments(index, text)
        yield from self._value(shown_as=self._rest)
        self._give(self._rest)
        self._rest = Markup

    # Words of it.

    def _until(self, marks: list[str], kind: Callable[[str], Part], rest: Callable[[str], Part]) -> Pause:
        """Give all before the first mark, and look at the mark. White space between them belongs to the mark.

        rest: what the beginning of a mark is, if no more comes.
        """
        self._rest = rest
        while True:
            found = [(place, mark) for mark in marks if (place := self._text.find(mark)) >= 0]
            if found:
                place, mark = min(found)
                end = len(self._text[:place].rstrip())
                self._give(kind, end)
                self._position = place + len(mark) - end
                return
            num_held = max((_overlap(self._text, mark) for mark in marks), default=0)
            certain = self._text[: len(self._text) - num_held]
            self._give(kind, len(certain.rstrip()) if marks else len(certain))
            yield

    def _separator(self, rest: Callable[[str], Part]) -> Pause:
        """What is looked at, and the white space behind it."""
        self._give(Markup)
        self._rest = Markup
        yield from self._run_of(_SPACE, shown_as=Markup)
        self._give(Markup)
        self._rest = rest

    def _takes(self, mark: str) -> Generator[None, None, bool]:
        """Look at white space and a mark, if they are what comes."""
        start = self._position
        is_there = yield from self._sees(mark)
        self._position = self._position + len(mark) if is_there else start
        return is_there

    def _sees(self, mark: str) -> Generator[None, None, bool]:
        yield from self._space()
        while not (is_there := self._text.startswith(mark, self._position)):
            if not mark.startswith(self._text[self._position :]):
                break
            yield
        return is_there

    def _space(self) -> Pause:
        yield from self._run_of(_SPACE)

    def _run_of(self, pattern: re.Pattern[str], shown_as: Callable[[str], Part] | None = None) -> Pause:
        """Look at as much as the pattern matches."""
        while True:
            match = pattern.match(self._text, self._position)
            assert match is not None, "it matches nothing, too"
            self._position = match.end()
            if self._position < len(self._text):
                return
            if shown_as is not None:
                self._give(shown_as)
            yield

    def _string(self) -> Generator[None, None, str | None]:
        """A JSON string. None if there is none."""
        if not (yield from self._sees('"')):
            return None
        start = self._position
        yield from self._value()
        try:
            value = json.loads(self._text[start : self._position], strict=False)
        except ValueError:
            return None
        return value if isinstance(value, str) else None

    def _value(self, shown_as: Callable[[str], Part] | None = None) -> Pause:
        """Look at one JSON value. Only strings and brackets are understood: the rest is the grammar's to keep."""
        yield from self._run_of(_SPACE, shown_as)
        depth, is_string = 0, False
        while True:
            yield from self._run_of(_IN_STRING if is_string else _SCALAR if depth == 0 else _OUTSIDE, shown_as)
            char = self._text[self._position]
            if is_string:
                if char == "\\":  # the escaped character has not come yet
                    if shown_as is not None:
                        self._give(shown_as)
                    yield
                    continue
                is_string = False
            elif char == '"':
                is_string = True
            elif char in "{[":
                depth += 1
            elif depth == 0:
                return  # behind a number or a word
            elif char in "}]":
                depth -= 1
            self._position += 1
            if depth == 0 and not is_string:
                return

    def _give(self, kind: Callable[[str], Part], num_characters: int | None = None) -> None:
        """The first characters at hand are this; without a number: those that are looked at."""
        num_characters = self._position if num_characters is None else num_characters
        if num_characters:
            self._parts.append(kind(self._text[:num_characters]))
            self._text = self._text[num_characters:]
        self._position = 0


def call_id(length: int = 0) -> str:
    """A new id: OpenAI's form, or so many letters and digits."""
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(length)) if length else f"call_{secrets.token_hex(12)}"


_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:/-]*")
_IN_STRING = re.compile(r'(?:[^"\\]|\\[\s\S])*')
_OUTSIDE = re.compile(r'[^"{}\[\]]*')
_SCALAR = re.compile(r'[^"{}\[\],\s]*')


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that is a beginning, but not the whole, of the mark."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
