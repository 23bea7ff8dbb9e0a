"""How models write what is no plain answer: the marks around their thoughts, and the ways they call tools.

One table, read by the parser of what comes (parts.py) and by what makes the model write it (tools.py). A call is its
name and its arguments as JSON, with marks around them:

    begin first NAME name_end ARGUMENTS end [more NAME name_end ARGUMENTS end]... close
    begin first {"name": NAME, arguments_key: ARGUMENTS} end [more {...} end]... close       without a name_end

White space between the marks means nothing. Which way is a model's is seen by the marks in its chat template.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class CallFormat:
    """One row of the table; the example is how two calls in a row look."""

    name: str
    begin: str  # what ends the answer's text
    first: str = ""
    name_end: str = ""  # empty: the name is in a JSON object with the arguments
    arguments_key: str = "arguments"
    end: str = ""
    more: str = ""
    close: str = ""
    is_bare: bool = False  # a "{" that opens the answer begins the calls, too
    id_length: int = 0  # of the calls' ids, where the template wants one; 0: any

    @property
    def repeats(self) -> bool:
        """Several calls are several beginnings, and text may stand between them."""
        return not self.more

    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""
        return name + self.name_end if self.name_end else f'{{"name": {json.dumps(name)}, "{self.arguments_key}": '

    @property
    def tail(self) -> str:
        """What stands after them."""
        return self.end if self.name_end else "}" + self.end

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Calls, as (name, arguments as JSON), in the model's own words."""
        texts = [self.head(name) + arguments + self.tail for name, arguments in calls]
        if self.repeats:
            return "\n".join(self.begin + self.first + text + self.close for text in texts)
        return self.begin + self.first + self.more.join(texts) + self.close


_DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
_FORMATS = [
    CallFormat("hermes", begin="<tool_call>", first="\n", end="\n</tool_call>"),
    CallFormat("llama3_json", begin="<|python_tag|>", arguments_key="parameters", more="; ", is_bare=True),
    CallFormat("mistral_list", begin="[TOOL_CALLS]", first=" [", more=", ", close="]", id_length=9),
    CallFormat("mistral", begin="[TOOL_CALLS]", name_end="[ARGS]", id_length=9),
    CallFormat(
        "deepseek_v3",
        begin="<｜tool▁calls▁begin｜>",
        first=f"{_DEEPSEEK_CALL}function<｜tool▁sep｜>",
        name_end="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        more=f"\n{_DEEPSEEK_CALL}function<｜tool▁sep｜>",
        close="<｜tool▁calls▁end｜>",
    ),
    CallFormat(
        "deepseek_v31",
        begin="<｜tool▁calls▁begin｜>",
        first=_DEEPSEEK_CALL,
        name_end="<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        more=_DEEPSEEK_CALL,
        close="<｜tool▁calls▁end｜>",
    ),
]
CALL_FORMATS = {format.name: format for format in _FORMATS}
HERMES = CALL_FORMATS["hermes"]


@dataclass(frozen=True)
class Marks:
    """What stands around a model's thoughts, which come before its answer."""

    begin: str
    end: str


MARKS = [
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("◁think▷", "◁/think▷"),
]


@dataclass(frozen=True)
class Dialect:
    """How one model writes."""

    call_format: CallFormat
    reads_tools: bool  # its template writes tools, calls and their results in that format
    marks: Marks | None


@lru_cache(maxsize=16)
def dialect_of(template: str, call_format: str = "auto") -> Dialect:
    """The dialect that a chat template is written for. call_format: a name of CALL_FORMATS, or "auto"."""
    marks = next((marks for marks in MARKS if marks.end in template), None)
    own = _own_format(template)
    asked = own if call_format == "auto" else CALL_FORMATS[call_format]
    has_tools = re.search(r"\btools\b", template) is not None
    return Dialect(asked or HERMES, has_tools and asked is not None and (asked == own or own is None), marks)


def _own_format(template: str) -> CallFormat | None:
    """The format of the template's own calls, if it is one of ours."""
    if "<｜tool▁calls▁begin｜>" in template:
        return CALL_FORMATS["deepseek_v3" if "```json" in template else "deepseek_v31"]
    if "[TOOL_CALLS]" in template:
        return CALL_FORMATS["mistral" if "[ARGS]" in template else "mistral_list"]
    if "<|python_tag|>" in template or "Environment: ipython" in template:
        return CALL_FORMATS["llama3_json"]
    if "<tool_call>" in template and "<function=" not in template:  # which is Qwen3-Coder's, and no JSON
        return HERMES
    return None
